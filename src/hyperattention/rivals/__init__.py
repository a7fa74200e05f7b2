"""Published methods of other authors, implemented as stages of this library for comparison."""

from hyperattention.methods.oracle import TopKeys
from hyperattention.rivals.anti_diagonal import AntiDiagonal
from hyperattention.rivals.budgeted_draw import BudgetedDraw
from hyperattention.rivals.collision_draw import CollisionDraw
from hyperattention.rivals.priority_draw import PriorityDraw
from hyperattention.rivals.vertical_slash import VerticalSlash

__all__ = ["AntiDiagonal", "BudgetedDraw", "CollisionDraw", "PriorityDraw", "TopKeys", "VerticalSlash"]
