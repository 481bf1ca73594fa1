"""`python -m onnx_utilrank`."""

import sys

from onnx_utilrank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
