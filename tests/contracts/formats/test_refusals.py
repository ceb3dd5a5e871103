"""What a format cannot hold is refused in a sentence, before anything is written."""

import pytest

from transcoders import random_dictionaries, save_dictionaries
from transcoders.errors import DictionaryError

CANNOT_HOLD = [
    ("circuit-tracer", {"kind": "sae"}, "'sae'"),
    ("circuit-tracer", {"kind": "clt", "skip": True}, "a skip term"),
    ("circuit-tracer", {"kind": "clt", "activation": "topk"}, "TopK"),
    ("saelens", {"kind": "clt"}, "one dictionary for each layer, not 'clt'"),
    ("saelens", {"kind": "plt", "activation": "topk"}, "no transcoder with the activation 'topk'"),
    ("clt-training", {"kind": "clt", "activation": "topk"}, "not TopK over all layers"),
    ("clt-training", {"kind": "plt"}, "save dictionaries of single layers as 'sparsify'"),
    ("sparsify", {"kind": "plt", "activation": "jumprelu"}, "not JumpReLU"),
    ("sparsify", {"kind": "clt"}, "not 'clt' dictionaries"),
    ("clt-forge", {"kind": "sae"}, "not 'sae' dictionaries"),
    ("clt-forge", {"kind": "clt", "skip": True}, "a skip term"),
    ("clt-forge", {"kind": "plt", "skip": True}, r"a skip term \(layer 0\)"),
    ("clt-forge", {"kind": "clt", "activation": "topk"}, "not TopK"),
    ("crosslayer-transcoder", {"kind": "sae"}, "not 'sae' dictionaries"),
    ("crosslayer-transcoder", {"kind": "clt", "skip": True}, "a skip term"),
    ("crosslayer-transcoder", {"kind": "plt", "skip": True}, r"a skip term \(layer 0\)"),
    ("crosslayer-transcoder", {"kind": "clt", "activation": "topk"}, "TopK over all layers"),
    ("gemma-scope", {"kind": "sae", "activation": "topk"}, "not TopK"),
    ("gemma-scope", {"kind": "plt"}, "no place for dictionaries that read mlp_in"),
    ("gemma-scope", {"kind": "clt"}, "not 'clt' dictionaries"),
    ("dictionary-learning", {"kind": "clt"}, "not 'clt'"),
    ("dictionary-learning", {"kind": "plt", "skip": True}, "cannot hold a skip term"),
    ("openai", {"kind": "plt"}, "not dictionaries that read mlp_in"),
    ("openai", {"kind": "clt"}, "not 'clt'"),
    ("openai", {"kind": "sae", "activation": "jumprelu"}, "not JumpReLU with None"),
    ("openai", {"kind": "sae", "activation": "topk"}, "not TopK with None"),
]


@pytest.mark.parametrize(("name", "case", "message"), CANNOT_HOLD)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, case, message):
    with pytest.raises(DictionaryError, match=message) as refused:
        save_dictionaries(random_dictionaries(**case), tmp_path / "out", format=name)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
