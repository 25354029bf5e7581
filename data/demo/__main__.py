"""python -m data.demo [folder]: make the demo data (see `data.demo.make`)."""

import argparse

from data.demo.make import make_demo

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m data.demo", description="Make the demo data.")
    parser.add_argument("folder", nargs="?", default="demo_data", help="where to")
    print(make_demo(parser.parse_args().folder))
