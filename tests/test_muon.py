import pytest
import torch

from icae.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 5, 5)])
def test_orthogonal_matrices_keep_their_vectors_and_lose_their_scale(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    core = left.mT @ made @ right.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(core, torch.diag_embed(values), atol=1e-3, rtol=0)
    torch.testing.assert_close(orthogonal(matrices * 1e-3), made, atol=1e-4, rtol=0)


def test_each_group_is_updated_by_its_own_rule_and_adamws_is_torchs():
    chance = torch.Generator().manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(6, 8, generator=chance)) for _ in range(3)]
    theirs = [torch.nn.Parameter(mine[2].detach().clone())]
    optimizer = Muon([{"params": mine[:2], "muon": True, "lr": 0.1}, {"params": mine[2:], "lr": 0.01}], weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(3):
        before = [p.detach().clone() for p in mine]
        for p in mine:
            p.grad = torch.randn(6, 8, generator=chance)
        theirs[0].grad = mine[2].grad.clone()
        first = mine[0].grad.clone()
        optimizer.step()
        adamw.step()
        if step == 0:  # the average is the gradient's own direction
            expected = 0.99 * before[0] - 0.1 * 0.2 * 8**0.5 * orthogonal(first[None])[0]
            torch.testing.assert_close(mine[0].detach(), expected, atol=1e-5, rtol=0)
    assert torch.equal(mine[2], theirs[0])
    assert all("momentum_buffer" in optimizer.state[p] for p in mine[:2]) and "exp_avg" in optimizer.state[mine[2]]


def test_matrices_without_a_gradient_stay_as_they_are():
    still, moving = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    moving.grad = torch.ones(2, 3)
    Muon([{"params": [still, moving], "muon": True}], lr=0.1).step()
    assert torch.equal(still.detach(), torch.ones(2, 3)) and not torch.equal(moving.detach(), torch.ones(2, 3))


def test_a_saved_state_goes_on_as_if_nothing_had_happened():
    def run(steps, state=None, at=None):
        mine = [torch.nn.Parameter(v.clone()) for v in (at or [torch.eye(3, 4), torch.ones(5)])]
        optimizer = Muon([{"params": mine[:1], "muon": True}, {"params": mine[1:]}], lr=0.1)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            for i, p in enumerate(mine):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        return [p.detach() for p in mine], optimizer.state_dict()

    whole, _ = run(range(4))
    half, state = run(range(2))
    rest, _ = run(range(2, 4), state, half)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))
