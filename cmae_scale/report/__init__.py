"""What a run shows to people: sheets of reconstructions and curves, as PNG files.

Gets tensors, numbers and paths; imports core only (and matplotlib). No model, no engine, no global state:
figures are drawn on a canvas of their own, so nothing here needs a display or touches another's figures.
"""

from cmae_scale.report.figures import read_metrics as read_metrics
from cmae_scale.report.figures import write_curves as write_curves
from cmae_scale.report.figures import write_reconstructions as write_reconstructions
