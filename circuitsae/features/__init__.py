"""Features of a dictionary, by what they do: found, exemplified, labelled, and every label tested.

`activations` and `contrast` find the features that tell some prompts from others, and suppress or swap them;
`examples` collects the texts on which a feature is most active; `ledger` holds labels with their evidence, and
`testing` fills in that evidence by measuring it on a model.
"""

from circuitsae.features.activations import Activations, activations_at
from circuitsae.features.contrast import FeatureChange, FeatureGroup, contrast, contrast_features, suppress, swap
from circuitsae.features.examples import Example, examples, examples_frame, token_activations
from circuitsae.features.ledger import Evidence, Label, Ledger, Status, Verdict
from circuitsae.features.testing import Claim, check_label, steering_row
