"""adsc.ops.boundary_step on the Triton backend: every form, opcheck, one graph, gradients."""

import torch
from torch import Tensor

import adsc_kernels as adsc

ROWS, WIDTH = 26, 16
SCHEDULE = adsc.CompressionSchedule.parse("1:1/4", num_layers=2)
PLAN = adsc.make_plan(SCHEDULE, [0, 20, ROWS], [(0, 3, 12)])
STAGE = PLAN.stages[1]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,))
    hidden, residual, weight = (torch.randn(*shape, generator=generator) for shape in shapes)
    return hidden, residual, weight


def test_every_form_is_that_of_the_cpu() -> None:
    hidden, residual, weight = inputs()
    layout = adsc.ops.BatchLayout(
        torch.tensor([0, 20, ROWS], dtype=torch.int32),
        torch.tensor([[0, 3, 12]], dtype=torch.int32),
        keep="1/4",
        num_tokens=STAGE.num_tokens,
    )
    others = [PLAN.stages[0].positions]
    for form in ({"stage": STAGE}, {"layout": layout}, {"keep_indices": STAGE.keep_indices()}):
        wanted = adsc.ops.boundary_step(
            hidden, residual=residual, weight=weight, others=others, **form
        )
        with adsc.backend("triton"):
            got = adsc.ops.boundary_step(
                hidden, residual=residual, weight=weight, others=others, **form
            )
        torch.testing.assert_close(got.hidden, wanted.hidden)
        assert torch.equal(got.residual, wanted.residual)
        assert torch.equal(got.others[0], wanted.others[0])
        assert (got.metadata is None) == ("layout" not in form)
        for mine, theirs in zip(got.metadata or (), wanted.metadata or (), strict=True):
            assert torch.equal(mine, theirs)


def test_opcheck() -> None:
    hidden, residual, weight = (x.requires_grad_() for x in inputs())
    moved = ([PLAN.stages[0].positions], STAGE.segments, None, None, None, [], "start", 0)
    torch.library.opcheck(
        torch.ops.adsc_triton.boundary_step.default,
        (hidden, residual, weight, 1e-6, *moved, STAGE.num_tokens),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_one_graph_and_its_gradients() -> None:
    hidden, residual, weight = (x.requires_grad_() for x in inputs())

    def step(hidden: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        done = adsc.ops.boundary_step(hidden, STAGE, residual=residual, weight=weight)
        return done.hidden.square().sum() + done.residual.sum()

    wanted = torch.autograd.grad(step(hidden, residual, weight), (hidden, residual, weight))
    with adsc.backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(hidden, residual, weight), (hidden, residual, weight))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
