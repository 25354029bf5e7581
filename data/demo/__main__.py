"""python -m data.demo [folder]: make the demo data (see `data.demo.make`)."""

import sys

from data.demo.make import make_demo

if __name__ == "__main__":
    print(make_demo(sys.argv[1] if len(sys.argv) > 1 else "demo_data"))
