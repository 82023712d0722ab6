"""The training loop on a GPU that is not there: where tensors lie, and what the host waits for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.engine import fake_training

BF16={"bf16":{"enabled":True}}
FP16={"fp16":{"enabled":True}}
AUTO={"torch_autocast":{"enabled":True,"dtype":"bfloat16"}}
AUTO16={"torch_autocast":{"enabled":True,"dtype":"float16"}}
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("prec", ["fp32","bf16","fp16","auto","auto16"])
@pytest.mark.parametrize("off", ["none","opt","both"])
def test_a_steady_step(on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], stage: int, prec, off) -> None:
    if off=="opt" and stage==0 or off=="both" and stage!=3: pytest.skip()
    zero={"stage":stage}
    if off!="none": zero["offload_optimizer"]={"device":"cpu"}
    if off=="both": zero["offload_param"]={"device":"cpu"}
    run = tiny_run(ranks=2, zero_optimization=zero, accumulation=2, cmae={"model": {"attention": "math"}}, **{"fp32":{},"bf16":BF16,"fp16":FP16,"auto":AUTO,"auto16":AUTO16}[prec])

    def train() -> Any:
        with fake_training(run) as training:
            waits = []
            for _ in range(4):
                training.gpu.waits.clear()
                training.take()
                waits.append(Counter(training.gpu.waits))
            return waits, Counter(training.ranks.calls)

    [(waits, calls)] = on_ranks(train, ranks=1)
    for one in waits[-1:]:
        print()
        for k,v in one.items(): print("   ",v,k)
    print(calls)
