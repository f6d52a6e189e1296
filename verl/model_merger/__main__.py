"""`python -m verl.model_merger {merge|test} --local_dir CKPT/actor ...`"""

from verl.model_merger.cli import main

if __name__ == "__main__":
    main()
