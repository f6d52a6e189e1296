"""`python -m verl.model_merger {merge|test} --backend fsdp --local_dir CKPT/actor ...`"""

from verl.model_merger.cli import main

main()
