"""Child of test_vllm_opens_merged: vLLM by itself, with nothing of ours; prints a JSON list of greedy answers' ids.

python opened_by_vllm.py FOLDER PROMPTS_AS_JSON
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.15, max_model_len=256)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    seen = {
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "ends": [output.outputs[0].finish_reason for output in outputs],
        "text": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
    }
    print("seen", json.dumps(seen))


if __name__ == "__main__":
    main()
