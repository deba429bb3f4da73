"""The model zoo: small models that cover what a function given to lorax may contain.

`ENTRIES` maps names to `Entry` objects; every module of this package adds its own when it is imported.
"""

from tests.zoo import architectures as architectures
from tests.zoo import control as control
from tests.zoo import convolution as convolution
from tests.zoo import experts as experts
from tests.zoo import indexing as indexing
from tests.zoo import linear as linear
from tests.zoo import linen_models as linen_models
from tests.zoo import nnx_models as nnx_models
from tests.zoo import other_libraries as other_libraries
from tests.zoo import recurrent as recurrent
from tests.zoo import reparametrised as reparametrised
from tests.zoo import scans as scans
from tests.zoo import trees as trees
from tests.zoo.entry import ENTRIES as ENTRIES
from tests.zoo.entry import Entry as Entry
from tests.zoo.entry import is_float as is_float
from tests.zoo.entry import leaves_by_path as leaves_by_path
