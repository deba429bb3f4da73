"""The line that tells how far a study is."""

from __future__ import annotations

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} updates, {remaining} left{postfix}"


class Progress(tqdm):
    """A bar over the updates of all runs, those of other processes as their groups are finished.

    Args:
        updates: of all runs together.
        done: those that were made before.
    """

    def __init__(self, updates: int, done: int):
        """Show the bar."""
        super().__init__(total=updates, initial=done, desc="study", bar_format=BAR, dynamic_ncols=True)

    def show(self, updates: int, *, groups: str, runs: str) -> None:
        """Show how many updates are done, and of groups and runs how many are finished."""
        self.set_postfix_str(f"{groups} groups, {runs} runs", refresh=False)
        self.n = max(updates, self.n)
        self.refresh()
