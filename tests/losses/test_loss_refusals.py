"""What cannot be done is refused with a sentence that says why, when it is asked for."""

import re

import numpy as np
import pytest
import torch
from losses.loss_cases import PLAIN, REQUIRED, Case, drawn

import fastdpo
from fastdpo.losses import REGISTRY, get_loss, resolve_losses

NEUTRAL = {  # what changes nothing, or a value that does
    "label_smoothing": (0.0, 0.1),
    "discopop_tau": (0.05, 1.0),
    "dpop_lambda": (50.0, 5.0),
    "cpo_alpha": (1.0, 0.5),
    "simpo_gamma": (0.5, 1.0),
    "alphapo_alpha": (0.25, 0.1),
    "desirable_weight": (1.0, 2.0),
    "undesirable_weight": (1.0, 2.0),
    "center_rewards_coefficient": (0.0, 0.1),
    "f_divergence_type": ("reverse_kl", "js_divergence"),
    "f_alpha_divergence_coef": (0.5, 0.7),
    "ld_alpha": (None, 0.5),
    "use_weighting": (False, True),
    "reference_free": (False, True),
}
UNABLE = [(name, option) for name, spec in REGISTRY.items() for option in NEUTRAL if option not in spec.honours]
NAN, INF = float("nan"), float("inf")


def pairs(count=3):
    inputs = drawn(Case(("sigmoid",)), count=count)
    return [tensor.detach() for tensor in (*inputs.logps, *inputs.refs)]


def refused(message: str, **arguments):
    """By what checks a configuration, and by the functions that take it."""
    with pytest.raises(ValueError, match=message):
        resolve_losses(**{"loss_type": "sigmoid"} | arguments)
    calls = {
        fastdpo.preference_loss: pairs(),
        fastdpo.loss: [torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)],
        fastdpo.linear_loss: [
            torch.zeros(2, 3, 4),
            torch.zeros(5, 4),
            torch.zeros(2, 3, dtype=torch.long),
            torch.zeros(2),
        ],
    }
    for function, tensors in calls.items():
        with pytest.raises(ValueError, match=message):
            function(*tensors, **arguments)


# Names


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("sigmod", "sigmoid"),
        ("kt0", "kto"),
        ("Hinge", "hinge"),
        ("simp0", "simpo"),
        ("apo-zero", "apo_zero"),
        ("ippo", "ipo"),
    ],
)
def test_unknown_losses_tell_the_nearest_first(wrong, nearest):
    message = f"loss_type is '{wrong}', which is no known loss\\. Did you mean '{nearest}'\\? Known are: {nearest}, "
    refused(message, loss_type=wrong)
    refused(message, loss_type=["sigmoid", wrong])
    with pytest.raises(ValueError) as caught:
        get_loss(wrong)
    told = str(caught.value).split("Known are: ")[1].rstrip(".").split(", ")
    assert sorted(told) == sorted(REGISTRY)


@pytest.mark.parametrize("wrong", ["", "zzzzzzzz", 3, None, True])
def test_unlike_any_name(wrong):
    names = "Known are: " + ", ".join(REGISTRY)
    with pytest.raises(ValueError, match=re.escape(f"loss_type is {wrong!r}, which is no known loss. {names}")):
        resolve_losses([wrong])


@pytest.mark.parametrize("wrong", [None, 3, True, 0.5])
def test_loss_types_that_are_no_names(wrong):
    refused("loss_type is", loss_type=wrong)


@pytest.mark.parametrize("none", [[], ()])
def test_no_loss(none):
    refused(r"loss_type is .*; name at least one loss of: sigmoid, hinge", loss_type=none)


@pytest.mark.parametrize(
    "names, told",
    [
        (["sigmoid", "kto"], r"sigmoid \(of pairs\) and kto \(of answers\)"),
        (["sigmoid", "listwise"], r"sigmoid \(of pairs\) and listwise \(of lists\)"),
        (["listwise", "apo_zero_unpaired"], r"listwise \(of lists\) and apo_zero_unpaired \(of answers\)"),
        (["sigmoid", "reward"], r"sigmoid \(of pairs\) and reward \(of scores\)"),
    ],
)
def test_losses_of_different_data(names, told):
    refused(f"loss_type mixes {told}, which are functions of different data; mix losses of one kind", loss_type=names)


# Options


def test_the_options_here_are_those_of_the_registry():
    assert set(NEUTRAL) == {option for spec in REGISTRY.values() for option in spec.honours}


@pytest.mark.parametrize("name, option", UNABLE)
def test_options_that_a_loss_cannot_honour(name, option):
    neutral, value = NEUTRAL[option]
    able = [spec.name for spec in REGISTRY.values() if option in spec.honours]
    required = REQUIRED.get(name, {})
    message = (
        f"{option}={value} has no meaning for loss_type {name}; leave it at {neutral} or choose a loss that honours"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        resolve_losses(name, **required, **{option: value})
    assert str(caught.value).rstrip(".").endswith(", ".join(able))
    assert resolve_losses(name, **required, **{option: neutral}).names == name  # changes nothing, so it is no mistake


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_options_are_refused_at_the_call(case):
    for option, (_, value) in NEUTRAL.items():
        if option not in case.specs[0].honours:
            with pytest.raises(ValueError, match=f"{option}={value} has no meaning for loss_type {case.names[0]}"):
                drawn(case).call(**{option: value})
    with pytest.raises(ValueError, match=r"gamma is no option of a loss; known are: label_smoothing, "):
        drawn(case).call(gamma=1.0)


@pytest.mark.parametrize(
    "names, option, told",
    [
        (["sigmoid", "cpo"], {"f_divergence_type": "forward_kl"}, None),
        (["sigmoid", "aot"], {"use_weighting": True}, None),
        (["sigmoid", "cpo"], {"ld_alpha": 0.5}, None),
        (["cpo", "simpo"], {"ld_alpha": 0.5}, "ld_alpha=0.5 has no meaning for loss_type cpo \\+ simpo"),
        (["hinge", "dpop"], {"label_smoothing": 0.1}, "has no meaning for loss_type hinge \\+ dpop"),
    ],
)
def test_options_of_a_mix(names, option, told):
    """Act on those that honour it; one must."""
    if told is None:
        assert resolve_losses(names, **option).pieces == resolve_losses(names).pieces | option
    else:
        with pytest.raises(ValueError, match=told):
            resolve_losses(names, **option)


@pytest.mark.parametrize(
    "option, values, told",
    [
        ("beta", [0, 0.0, -1.0, NAN, INF, True, "0.1", None, torch.tensor(0.1), [0.1]], "must be a number above 0"),
        ("label_smoothing", [-0.1, 0.51, 1.0, NAN, True, "0.1", None, torch.tensor(0.1)], r"must lie in \[0, 0.5\]"),
        ("discopop_tau", [0, -1.0, NAN, INF, True, "1", None], "must be a number above 0"),
        ("dpop_lambda", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        ("cpo_alpha", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        ("simpo_gamma", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        ("alphapo_alpha", [NAN, INF, True, "1", None], "must be a number"),
        ("desirable_weight", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        ("undesirable_weight", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        ("center_rewards_coefficient", [-1.0, NAN, INF, True, "1", None], "must be a number from 0"),
        (
            "f_divergence_type",
            ["kl", "reverse", None, 3, ["reverse_kl"]],
            "must be one of reverse_kl, forward_kl, js_div",
        ),
        ("f_alpha_divergence_coef", [NAN, INF, -INF, True, "1", None], "must be a number"),
        ("ld_alpha", [-0.1, 1.1, NAN, True, "1"], r"must lie in \[0, 1\], or None"),
        ("use_weighting", [1, 0, None, "yes"], "must be True or False"),
        ("reference_free", [1, 0, None, "yes"], "must be True or False"),
    ],
)
def test_values_out_of_range(option, values, told):
    able = next((name for name, spec in REGISTRY.items() if option in spec.honours), "sigmoid")
    for value in values:
        with pytest.raises(ValueError, match=f"{option} is .*; it {told}"):
            resolve_losses(able, **{option: value})


@pytest.mark.parametrize(
    "value", [10**400, np.float32(0.1), np.float64(0.1), np.int64(1)], ids=["int", "float32", "float64", "int64"]
)
def test_numbers_of_other_libraries(value):
    """Work or are refused with a sentence."""
    try:
        losses = resolve_losses("sigmoid", beta=value)
    except ValueError as error:
        assert "beta is" in str(error)
    else:
        assert losses.beta == float(value)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.0}])
def test_exo_pair_needs_smoothing(options):
    refused(r"label_smoothing is 0\.0; for loss_type exo_pair it must be above 0", loss_type="exo_pair", **options)
    refused(r"label_smoothing is 0\.0; for loss_type exo_pair", loss_type=["sigmoid", "exo_pair"], **options)


def test_robust_is_not_defined_at_one_half():
    message = r"label_smoothing is 0\.5; for loss_type robust it must be below 0\.5"
    refused(message, loss_type="robust", label_smoothing=0.5)
    refused(message, loss_type=["sigmoid", "robust"], label_smoothing=0.5)


@pytest.mark.parametrize("kind", [{}, {"f_divergence_type": "reverse_kl"}, {"f_divergence_type": "js_divergence"}])
def test_the_coefficient_of_no_alpha_divergence(kind):
    told = kind.get("f_divergence_type", "reverse_kl")
    refused(f"f_alpha_divergence_coef=0.7 has no meaning with f_divergence_type='{told}'", f_alpha_divergence_coef=0.7,
            **kind)  # fmt: skip


@pytest.mark.parametrize(
    "weights, told",
    [
        ([1.0], r"loss_weights has 1 values and loss_type 2 losses \(sigmoid, hinge\)"),
        ([1.0, 1.0, 1.0], "loss_weights has 3 values and loss_type 2 losses"),
        ([1.0, NAN], "loss_weights gives hinge the weight nan; it must be a number"),
        ([INF, 1.0], "loss_weights gives sigmoid the weight inf; it must be a number"),
        ([1.0, True], "loss_weights gives hinge the weight True"),
        ([1.0, None], "loss_weights gives hinge the weight None"),
        ("ab", "loss_weights is 'ab'; it must be a list"),
        (0.5, "loss_weights"),
    ],
)
def test_weights_of_a_mix(weights, told):
    refused(told, loss_type=["sigmoid", "hinge"], loss_weights=weights)


@pytest.mark.parametrize("name", ["nca_pair", "dpop", "kto"])
def test_reference_free_of_a_mix_with_what_needs_one(name):
    able = "sigmoid" if REGISTRY[name].data == "pairs" else "apo_zero_unpaired"
    resolve_losses([able, name])
    if "reference_free" not in REGISTRY[name].pieces:
        with pytest.raises(ValueError, match="reference_free=True has no meaning for"):
            resolve_losses([able, name], reference_free=True)
    else:
        assert not resolve_losses([able, name], reference_free=True).needs_reference


@pytest.mark.parametrize("reduction", ["avg", None, "", "Mean", True])
@pytest.mark.parametrize("case", [Case(("sigmoid",)), Case(("listwise",)), Case(("kto",))], ids=str)
def test_reductions(case, reduction):
    with pytest.raises(ValueError, match=f"reduction is {reduction!r}; it must be one of 'mean', 'sum', 'none'"):
        drawn(case).call(reduction=reduction)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"ld_alpha": 1.0}])
def test_options_of_tokens(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} acts on single tokens, which sums have lost"):
        fastdpo.preference_loss(*pairs(), **options)


# The wrong function


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_wrong_function_for_the_data(case):
    name, data = case.names[0], case.data
    options = {"loss_type": name, **case.options}
    if data in ("lists", "answers"):
        right = {"lists": "listwise_loss", "answers": "unpaired_loss"}[data]
        with pytest.raises(ValueError, match=f"loss_type {name} is a loss of {data}, .*; call fastdpo.{right}"):
            fastdpo.preference_loss(*pairs(), **options)
    if data != "lists":
        with pytest.raises(ValueError, match=f"loss_type {name} is a loss of {data}, not of lists"):
            fastdpo.listwise_loss(torch.zeros(2, 2), torch.zeros(2, 2), **options)
    if data != "answers":
        with pytest.raises(ValueError, match=f"loss_type {name} is a loss of {data}, not of single answers"):
            fastdpo.unpaired_loss(torch.zeros(2), torch.zeros(2), desirable=torch.ones(2).bool(), **options)
    if data == "scores":
        with pytest.raises(ValueError, match="is a loss of a reward model's scores, not of log-probs"):
            fastdpo.loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), **options)


# Tensors of pairs


@pytest.mark.parametrize("case", [case for case in PLAIN if case.data == "pairs"], ids=str)
def test_what_a_loss_of_pairs_needs(case):
    chosen, rejected, *refs = pairs()
    spec, lengths = case.specs[0], {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}
    options = {"loss_type": case.names[0], **case.options}
    if spec.needs_reference:
        with pytest.raises(ValueError, match=r"ref_logps is missing, and loss_type .* needs the reference's log-probs"):
            fastdpo.preference_loss(chosen, rejected, **lengths, **options)
    else:
        assert fastdpo.preference_loss(chosen, rejected, **lengths, **options).loss.isfinite()
    if spec.needs_lengths:
        for missing in lengths:
            some = {key: value for key, value in lengths.items() if key != missing}
            with pytest.raises(
                ValueError, match="divides by the completions' lengths; give chosen_lengths and rejected"
            ):
                fastdpo.preference_loss(chosen, rejected, *refs, **some, **options)
    else:
        assert fastdpo.preference_loss(chosen, rejected, *refs, **options).loss.isfinite()


def test_one_reference():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    with pytest.raises(ValueError, match="ref_rejected_logps is missing; give both references or neither"):
        fastdpo.preference_loss(chosen, rejected, ref_chosen)
    with pytest.raises(ValueError, match="ref_chosen_logps is missing; give both references or neither"):
        fastdpo.preference_loss(chosen, rejected, ref_rejected_logps=ref_rejected)


def test_references_where_there_are_none():
    with pytest.raises(ValueError, match="reference_free=True and ref_logps contradict each other"):
        fastdpo.preference_loss(*pairs(), reference_free=True)
    with pytest.raises(ValueError, match="reference_free=True and ref_logps contradict each other"):
        fastdpo.listwise_loss(torch.zeros(2, 2), torch.zeros(2, 2), reference_free=True)
    # A reward model has none, and its rewards would be off by them.
    with pytest.raises(ValueError, match=r"ref_\w+ has no meaning for loss_type reward|reference.* loss_type reward"):
        fastdpo.preference_loss(*pairs(), loss_type="reward")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [2, 3])
@pytest.mark.parametrize("name", ["sigmoid", "simpo"])
def test_references_that_are_no_numbers(bad, place, name):
    values = pairs()
    values[place][1] = bad
    with pytest.raises(ValueError, match=f"ref_logps is {bad} at .* every value must be a finite number"):
        fastdpo.preference_loss(*values, loss_type=name, chosen_lengths=torch.ones(3), rejected_lengths=torch.ones(3))


def test_references_that_leave_the_dtype_of_the_log_probs():
    """float64 references beyond float32 are no numbers there."""
    chosen, rejected, *refs = pairs()
    refs[0] = refs[0].clone()
    refs[0][0] = -1e39
    with pytest.raises(ValueError, match="ref_logps is -inf"):
        fastdpo.preference_loss(chosen.float(), rejected.float(), *refs)
    with pytest.raises(ValueError, match="ref_logps is -inf"):
        fastdpo.listwise_loss(torch.zeros(1, 3), refs[0].view(1, 3))


NAMES = [
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (3, 1), (1,), (4,), (0,)])
def test_shapes_of_pairs(name, shape):
    values = dict(zip(NAMES, [*pairs(), torch.ones(3), torch.ones(3)], strict=True))
    values[name] = torch.ones(shape)
    with pytest.raises(ValueError, match=r"\w+ has shape .*; it must be \(|the batch holds no pair"):
        fastdpo.preference_loss(**values, loss_type="ipo")


@pytest.mark.parametrize("name", ["pair_weights", "margins"])
@pytest.mark.parametrize("shape", [(), (3, 1), (1,), (4,)])
def test_shapes_of_vectors(name, shape):
    chosen, rejected, *_ = pairs()
    with pytest.raises(ValueError, match=f"{name} has shape .*; 3 pairs need \\(3,\\)"):
        fastdpo.preference_loss(chosen, rejected, loss_type="reward", **{name: torch.ones(shape)})


def test_no_pairs():
    for name, case in (("pair", "sigmoid"), ("pair", "reward")):
        empty = [torch.zeros(0)] * (2 if case == "reward" else 4)
        with pytest.raises(ValueError, match=rf"the batch holds no {name} \(B = 0\); leave empty batches out"):
            fastdpo.preference_loss(*empty, loss_type=case)
    with pytest.raises(ValueError, match=r"the batch holds no answer \(B = 0\)"):
        fastdpo.unpaired_loss(torch.zeros(0), torch.zeros(0), desirable=torch.zeros(0).bool(), kl=0.0)
    with pytest.raises(ValueError, match="the batch holds no list"):
        fastdpo.listwise_loss(torch.zeros(0), torch.zeros(0), list_sizes=[])
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="the batch holds no list"):
            fastdpo.listwise_loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="the batch holds no list"):
        fastdpo.listwise_loss(torch.zeros(0), torch.zeros(0), list_sizes=2, ranks=torch.zeros(0))


@pytest.mark.parametrize("case", [case for case in PLAIN if case.per_pair], ids=str)
@pytest.mark.parametrize(
    "bad, told",
    [
        (-0.1, "has -0.1.*; a weight must not be below 0"),
        (NAN, "is nan"),
        (INF, "is inf"),
        (-INF, "is -inf"),
    ],
)
def test_weights(case, bad, told):
    with pytest.raises(ValueError, match=f"pair_weights {told}"):
        drawn(case, count=3).call(pair_weights=torch.tensor([1.0, bad, 1.0]))


@pytest.mark.parametrize("names", [("aot",), ("aot_unpaired",), ("sigmoid", "aot")])
def test_weights_of_what_compares_pairs(names):
    with pytest.raises(ValueError, match=r"pair_weights has no meaning for loss_type .*aot.*, which compares"):
        drawn(Case(names), count=3).call(pair_weights=torch.ones(3))


def test_margins():
    chosen, rejected, *refs = pairs()
    with pytest.raises(ValueError, match="margins has no meaning for loss_type sigmoid"):
        fastdpo.preference_loss(chosen, rejected, *refs, margins=torch.ones(3))
    with pytest.raises(ValueError, match="margins is nan at 1"):
        fastdpo.preference_loss(chosen, rejected, loss_type="reward", margins=torch.tensor([1.0, NAN, 1.0]))


@pytest.mark.parametrize("bad", [NAN, INF, -1.0])
@pytest.mark.parametrize("name", ["chosen_lengths", "rejected_lengths"])
def test_lengths_that_are_none(name, bad):
    lengths = {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}
    lengths[name][1] = bad
    with pytest.raises(ValueError, match="lengths"):
        fastdpo.preference_loss(*pairs(), loss_type="ipo", **lengths)


DEVICES = [*NAMES, "pair_weights"]


@pytest.mark.parametrize("name", DEVICES[1:])
def test_other_devices(name):
    values = dict(zip(DEVICES, [*pairs(), *[torch.ones(3)] * 3], strict=True))
    values[name] = values[name].to("meta")
    with pytest.raises(ValueError, match="is on meta"):
        fastdpo.preference_loss(**values, loss_type="ipo")


# Tensors of lists


@pytest.mark.parametrize(
    "logps, arguments, told",
    [
        ((2, 1), {}, r"list_sizes has 1 \(list 0\); a ranking needs at least two completions"),
        ((6,), {}, "list_sizes is missing, and loss_type listwise is a loss of lists; give list_sizes"),
        ((6,), {"list_sizes": [3, 2]}, "list_sizes add up to 5, and there are 6 sequences"),
        ((6,), {"list_sizes": [5, 1]}, r"list_sizes has 1 \(list 1\)"),
        ((6,), {"list_sizes": [7, -1]}, r"list_sizes has -1 \(list 1\)"),
        ((6,), {"list_sizes": 4}, "list_sizes is 4, and 6 sequences are no multiple of it"),
        ((6,), {"list_sizes": 0}, "list_sizes is 0"),
        ((6,), {"list_sizes": -2}, "list_sizes is -2"),
        ((6,), {"list_sizes": 1}, "list_sizes has 1"),
        ((6,), {"list_sizes": []}, "list_sizes add up to 0"),
        ((6,), {"list_sizes": [3.5, 3.0]}, "list_sizes"),
        ((6,), {"list_sizes": 3.0}, "list_sizes"),
        ((6,), {"list_sizes": np.int64(4)}, "list_sizes"),
        ((6,), {"list_sizes": "33"}, "list_sizes"),
        ((2, 3), {"list_sizes": 3}, r"list_sizes is for logps of shape \(S,\)"),
        ((), {"list_sizes": 1}, r"logps has shape \(\); it must be \(B, K\), or \(S,\) with list_sizes"),
        ((1, 2, 3), {}, r"logps has shape \(1, 2, 3\)"),
        (
            (2, 3),
            {"ranks": torch.tensor([[1, 2, 3], [1, 3, 3]])},
            r"the ranks of list 1 are \[1, 3, 3\]; no two may be",
        ),
        ((2, 3), {"ranks": torch.tensor([[1.0, NAN, 3.0], [1, 2, 3]])}, "ranks"),
        ((2, 3), {"ranks": torch.ones(6)}, r"ranks has shape \(6,\); it must be \(2, 3\), that of logps"),
        ((6,), {"ranks": torch.arange(6)}, "list_sizes is missing"),
        ((6,), {"ranks": torch.arange(6), "list_sizes": [3, 4]}, "list_sizes add up to 7"),
        ((2, 3), {"lengths": torch.ones(2)}, r"lengths has shape \(2,\); it must be \(2, 3\)"),
        ((2, 3), {"pair_weights": torch.ones(6)}, r"pair_weights has shape \(6,\); 2 lists need \(2,\)"),
        ((2, 3), {"margins": torch.ones(2)}, "margins is no option of a loss"),
    ],
)
def test_lists(logps, arguments, told):
    with pytest.raises(ValueError, match=told):
        fastdpo.listwise_loss(torch.zeros(logps), torch.zeros(logps), **arguments)


def test_references_of_lists():
    with pytest.raises(ValueError, match="ref_logps is missing, and loss_type listwise needs the reference's"):
        fastdpo.listwise_loss(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"ref_logps has shape \(4,\); it must be \(2, 2\), that of logps"):
        fastdpo.listwise_loss(torch.zeros(2, 2), torch.zeros(4))
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=f"ref_logps is {bad} at 1 "):
            fastdpo.listwise_loss(torch.zeros(2, 2), torch.tensor([[0, bad], [0, 0]]))


# Tensors of single answers

GOOD = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({}, "kl is missing, and loss_type kto needs it; give kl, or kl_logps and ref_kl_logps"),
        ({"kl": NAN}, "kl is nan"),
        ({"kl": INF}, "kl is inf"),
        ({"kl": torch.ones(3)}, r"kl has shape \(3,\); it must be one number"),
        ({"kl": torch.ones(1)}, r"kl has shape \(1,\); it must be one number"),
        ({"kl": torch.ones((), device="meta")}, "kl"),
        ({"kl": 0.0, "kl_logps": torch.ones(2), "ref_kl_logps": torch.ones(2)}, "kl is given, and kl_logps"),
        ({"kl_logps": torch.ones(2)}, "kl_logps and ref_kl_logps go together"),
        ({"ref_kl_logps": torch.ones(2)}, "kl_logps and ref_kl_logps go together"),
        (
            {"kl_logps": torch.ones(2), "ref_kl_logps": torch.ones(3)},
            r"kl_logps has shape \(2,\) and ref_kl_logps \(3,\)",
        ),
        ({"kl_logps": torch.ones(0), "ref_kl_logps": torch.ones(0)}, "M at least 1"),
        ({"kl_logps": torch.ones(2, 2), "ref_kl_logps": torch.ones(2, 2)}, r"both must be \(M,\)"),
        ({"kl_logps": torch.ones(1), "ref_kl_logps": torch.tensor([NAN])}, "ref_kl_logps is nan at 0"),
        ({"kl": 0.0, "loss_type": "apo_zero_unpaired"}, "kl has no meaning for loss_type apo_zero_unpaired"),
        (
            {"kl_logps": torch.ones(2), "ref_kl_logps": torch.ones(2), "loss_type": "apo_zero_unpaired"},
            "kl.* has no meaning for loss_type apo_zero_unpaired",
        ),
        (
            {"kl": 0.0, "desirable": torch.ones(3)},
            r"desirable has shape \(3,\) and dtype torch.float32; it must be \(3,\)",
        ),
        ({"kl": 0.0, "desirable": torch.ones(3, dtype=torch.long)}, "dtype torch.int64"),
        ({"kl": 0.0, "desirable": GOOD[:2]}, r"desirable has shape \(2,\)"),
        ({"kl": 0.0, "desirable": GOOD[:, None]}, r"desirable has shape \(3, 1\)"),
        ({"kl": 0.0, "desirable": None}, "desirable is missing, and loss_type kto is a loss of answers"),
        ({"kl": 0.0, "desirable": GOOD.to("meta")}, "desirable is on meta"),
        ({"kl": 0.0, "pair_weights": torch.ones(2)}, r"pair_weights has shape \(2,\); 3 answers need \(3,\)"),
        ({"kl": 0.0, "reference_free": True}, "reference_free=True has no meaning for loss_type kto"),
    ],
)
def test_answers(arguments, told):
    with pytest.raises(ValueError, match=told):
        fastdpo.unpaired_loss(torch.zeros(3), torch.zeros(3), **{"desirable": GOOD} | arguments)


def test_log_probs_and_references_of_answers():
    with pytest.raises(ValueError, match="ref_logps is missing, and loss_type kto needs the reference's"):
        fastdpo.unpaired_loss(torch.zeros(3), desirable=GOOD, kl=0.0)
    with pytest.raises(ValueError, match=r"ref_logps has shape \(2,\); it must be \(3,\): one sum a sequence"):
        fastdpo.unpaired_loss(torch.zeros(3), torch.zeros(2), desirable=GOOD, kl=0.0)
    for shape in ((), (3, 1)):
        with pytest.raises(ValueError, match=r"logps has shape .*; it must be \(B,\): one sum an answer"):
            fastdpo.unpaired_loss(torch.zeros(shape), torch.zeros(3), desirable=GOOD, kl=0.0)
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=f"ref_logps is {bad} at 2 "):
            fastdpo.unpaired_loss(torch.zeros(3), torch.tensor([0, 0, bad]), desirable=GOOD, kl=0.0)
