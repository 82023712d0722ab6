"""From decoded master images to the two normalised views, batched and on the images' own device.

`draws` says every random number of a global batch, `color` colours and blurs, `views` cuts and puts them
together. Imports core only (and torch); the data, models and engine folders are unknown here.
"""

from cmae_scale.augment.draws import ViewNumbers as ViewNumbers
from cmae_scale.augment.draws import draw_views as draw_views
from cmae_scale.augment.views import denormalise as denormalise
from cmae_scale.augment.views import make_views as make_views
