"""Einstein sums of two tensors become matrix products, and only those that are one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from modelport.exporters import _torch_einsum  # noqa: E402

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6}


def _drawn(equation: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    terms = equation.replace(" ", "").split("->")[0].split(",")
    return [torch.randn([SIZES[c] for c in term], generator=generator, dtype=torch.float64)
            for term in terms]


@pytest.mark.parametrize("equation", [
    "abc,adc->abd", "bacd,becd->bace", "abcd,abde->abce", "ac, cb -> ba", "abc,c->ab", "c,abc->ba",
    "c,c->", "abcd,ebd->cae",
])
def test_the_same_numbers(equation: str) -> None:
    operands = _drawn(equation)
    expected = torch.einsum(equation, *operands)
    torch.testing.assert_close(_torch_einsum.einsum(equation, *operands), expected)
    torch.testing.assert_close(_torch_einsum.einsum(equation, tuple(operands)), expected)


@pytest.mark.parametrize("equation", ["abcd,abed->abce", "abc,adc->abd", "abc,bc->ab"])
def test_a_product_is_recorded_as_one(equation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("went to torch.einsum")

    monkeypatch.setattr(_torch_einsum, "_einsum", refuse)
    _torch_einsum.einsum(equation, *_drawn(equation))


@pytest.mark.parametrize("equation", [
    "ab,ab->ab", "abc,abc->a", "aab,bc->ac", "ab->ba", "a...b,b->a...", "ab,bc", "abc,dec->abde",
    "ab,bc->a",
])
def test_what_is_no_product_of_matrices_is_left_alone(equation: str) -> None:
    assert _torch_einsum._product(equation) is None


def test_a_product_without_elements() -> None:
    empty = _torch_einsum.einsum("bld,bsd->bls", torch.ones(2, 3, 4), torch.ones(2, 0, 4))
    assert empty.shape == (2, 3, 0)
