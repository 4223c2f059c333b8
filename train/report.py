"""Pictures and tables for scripts of one's own; see `train.core.figures`."""

from train.core.figures import image_grid as image_grid
from train.core.figures import loss_curve as loss_curve
from train.core.figures import scatter as scatter
from train.core.figures import table as table
