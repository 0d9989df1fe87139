#!/usr/bin/env bash
# The OpenAI-compatible server of vLLM with ADSC, for the bundled model on a CPU.
#   examples/vllm/serve.sh                  # then: python examples/vllm/client.py
#   SCHEDULE= examples/vllm/serve.sh        # drops nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"  # GiB; by itself vLLM wants 0.92 of the memory
exec python -m vllm.entrypoints.openai.api_server \
  --model adsc_kernels/checkpoints/tiny-llava-digits --served-model-name tiny-llava-digits \
  --hf-overrides '{"architectures": ["AdscLlavaForConditionalGeneration"]}' \
  --additional-config "{\"adsc_schedule\": \"${SCHEDULE-4:1/4,8:1/4,12:1/4}\"}" \
  --dtype float32 --block-size 32 --max-model-len 1024 --enforce-eager \
  --host 127.0.0.1 --port "${PORT:-8000}" "$@"
