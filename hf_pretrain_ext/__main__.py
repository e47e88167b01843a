"""`python -m hf_pretrain_ext`, and `torchrun -m hf_pretrain_ext`."""

import sys

from hf_pretrain_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
