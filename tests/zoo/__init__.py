"""The model zoo: small models that cover what a function given to lorax may contain.

`ENTRIES` maps names to `Entry` objects; every module of this package adds its own when it is imported.
"""

from zoo import architectures as architectures
from zoo import control as control
from zoo import convolution as convolution
from zoo import experts as experts
from zoo import linear as linear
from zoo import linen_models as linen_models
from zoo import nnx_models as nnx_models
from zoo import other_libraries as other_libraries
from zoo import recurrent as recurrent
from zoo import reparametrised as reparametrised
from zoo import scans as scans
from zoo import trees as trees
from zoo.entry import ENTRIES as ENTRIES
from zoo.entry import Entry as Entry
from zoo.entry import is_float as is_float
from zoo.entry import leaves_by_path as leaves_by_path
