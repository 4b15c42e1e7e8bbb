"""Calls by gRPC, each kind once, and prints a line of what came of each. Arguments: whom to call, whom to believe, the
name there, and the calls."""

import sys

import grpc

TO, AUTHORITY, NAME, *CALLS = sys.argv[1:]
with open(AUTHORITY, "rb") as authority:
    believed = grpc.ssl_channel_credentials(authority.read())
channel = grpc.secure_channel(TO, believed, [("grpc.ssl_target_name_override", NAME)])
PATH = "/shop.Shop/"
ADDED = (("x-asked", "1"), ("x-forwarded-proto", "made-up"))


def said(name, call):
    try:
        print(name, call())
    except grpc.RpcError as error:
        print(name, error.code().name, error.details())


def say():
    answer, call = channel.unary_unary(PATH + "Say").with_call(b"good day", timeout=10, metadata=ADDED)
    by = [value for key, value in call.trailing_metadata() if key == "x-by"]
    return f"{answer.decode()} {len(by)}"


def large():
    return len(channel.unary_unary(PATH + "Say")(b"a" * 3_000_000, timeout=10))


def turns():
    heard = channel.stream_stream(PATH + "Turns")(iter([b"abc", b"de", b"fgh" * 9000]), timeout=10)
    return [len(part) for part in heard]


KNOWN = {
    "say": say,
    "large": large,
    "turns": turns,
    "fail": lambda: channel.unary_unary(PATH + "Fail")(b"zuerich", timeout=10),
    "late": lambda: channel.unary_unary(PATH + "Sleep")(b"5", timeout=0.5),
    "slow": lambda: channel.unary_unary(PATH + "Sleep")(b"5", timeout=10),
    "who": lambda: channel.unary_unary(PATH + "Who")(b"", timeout=10, metadata=ADDED).decode(),
    "count": lambda: sum(int(part) for part in channel.unary_stream(PATH + "Count")(b"1000", timeout=10)),
    "add": lambda: channel.stream_unary(PATH + "Add")((b"%d" % n for n in range(500)), timeout=10).decode(),
    "unknown": lambda: channel.unary_unary("/shop.Other/Say")(b"", timeout=10),
}
for name in CALLS:
    said(name, KNOWN[name])
