"""`python -m verl.pipeline --model BASE --data TRAIN --val VAL --exp_name NAME ...`"""

import sys

from verl.pipeline.command import main

sys.exit(main())
