#!/usr/bin/env bash
# From a list of questions to a trained student, on this machine alone: two teachers, which are one
# model at two temperatures, are served on loopback; then collect, score, train, evaluate.
#
#   recipes/collect/run.sh MODEL QUESTIONS.jsonl TEST.jsonl FOLDER
#
# MODEL is the teacher and the student: a folder, a name or a .gguf file, with a chat template.
# It needs the packages of `transformers serve` (fastapi, uvicorn), which `make native` installs.
# Started again, it asks no question twice. PORT, TOKENS (of an answer), TEMPLATE (of the question)
# and STEPS may be set.
set -euo pipefail
model=$1 questions=$2 test=$3 folder=$(mkdir -p "$4" && cd "$4" && pwd)
port=${PORT:-8811} tokens=${TOKENS:-256} steps=${STEPS:-20} template=${TEMPLATE:-step-by-step}
here=$(cd "$(dirname "$0")" && pwd)

# A server reads a folder; a .gguf file becomes one.
[ -e "$folder/teacher" ] || compact export --model "$model" --out "$folder/teacher"
# `transformers serve` ignores the temperature unless the model's own settings say do_sample.
python - "$folder/teacher/generation_config.json" <<'END'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
END
transformers serve "$folder/teacher" --host 127.0.0.1 --port "$port" > "$folder/serve.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -s -o "$folder/health" "http://127.0.0.1:$port/health"; do
  kill -0 $server || { cat "$folder/serve.log"; exit 1; }
  sleep 0.5
done

cat > "$folder/teachers.yaml" <<END
- {name: cool, model: $folder/teacher, base_url: "http://127.0.0.1:$port/v1", temperature: 0.2,
   max_tokens: $tokens, concurrency: 2, template: "$template"}
- {name: warm, model: $folder/teacher, base_url: "http://127.0.0.1:$port/v1", temperature: 0.9,
   max_tokens: $tokens, concurrency: 2, template: "$template"}
END
compact collect "$questions" --teachers "$folder/teachers.yaml" --out "$folder/rationales.jsonl"
compact score "$folder/rationales.jsonl" --model "$folder/teacher" --out "$folder/scores.jsonl"
compact train --config "$here/train.yaml" --model "$folder/teacher" \
  --data "$folder/rationales.jsonl" --output_dir "$folder/run" --max_steps "$steps"
compact evaluate --model "$folder/run" --data "$test" --max_new_tokens "$tokens" \
  --out "$folder/evaluate.jsonl"
