"""`python -m verl.data_tools.collect PROMPTS --out FILE --endpoint URL --model NAME`."""

import sys

from verl.data_tools.collect.command import main

sys.exit(main())
