"""Sparse kernels: encoders that give active features, decoders and gradients that touch nothing else.

What is here, all with gradients and all checked against dense float64 products (usable now, on any device):

* `topk_encode`, `batch_topk_encode`, `threshold_encode` (ReLU, JumpReLU), `auxk_encode` (dead features only), and
  `pre_activations_at` for features chosen otherwise: `SparseActivations(value, active)`. They return pre-activations;
  apply ReLU or JumpReLU to `value` as to any tensor. `over_layers=True` ranks all layers of a token together.
* `decode` (sparse or dense by density), `sparse_decode`, `dense_decode`, and `cross_layer_decode` for CLTs;
  `dense_cross_layer_decode` of all features, with as many launches a layer however many layers it writes to.
* `ActiveFeatures`: which features are active where. `.fired()` for dead counters, `.counts()` for L0, `.dense(value)`,
  `active_from_mask` to make one.
* `weighted_sum` and `inner_products`: the two products everything is made of.
* `feature_major` lays out an encoder as the kernels read it; `keep_freed_memory` and `quickest_threads` are for a
  training loop to call once.

`cpu` and `gpu` are two forms of the same functions, a sparse sum and sparse inner products; `products` chooses by
where the weights are, and gives both their gradients. `encode` and `decode` are made of these. Which features are
active is `selection`'s part: from exact products, or on a processor from ones that are cheaper and bounded (`pays`). On
a device `ranked` ranks pre-activations where they are, by `selection_gpu` on a GPU, and the host asks nothing.

Everything takes stacks of layers (`x [layer, batch, d_in]`, `W_enc [layer, d_in, feature]`, `W_dec [layer, feature,
d_out]`); one dictionary is a stack of one (`x[None]`). Pass whole parameters, not slices of them: the gradient of a
slice is a dense tensor of the whole. A parameter with `feature_major` layout costs no copies.
"""

from transcoders.kernels.active import ActiveFeatures, SparseActivations, active_from_mask, active_from_pairs
from transcoders.kernels.decode import (
    DENSE_ABOVE,
    cross_layer_decode,
    decode,
    dense_cross_layer_decode,
    dense_decode,
    sparse_decode,
)
from transcoders.kernels.encode import (
    auxk_encode,
    batch_topk_encode,
    feature_major,
    pre_activations_at,
    threshold_encode,
    topk_encode,
)
from transcoders.kernels.host import keep_freed_memory, quickest_threads, release_freed_memory
from transcoders.kernels.products import inner_products, weighted_sum
