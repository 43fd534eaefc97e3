"""DeepSpeed's tool that converts checkpoints, with files loaded as data only: a program for universal.py."""

from __future__ import annotations

from hft_cli.launch.compat import load_data_only

if __name__ == "__main__":
    load_data_only()
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    main(parse_arguments())
