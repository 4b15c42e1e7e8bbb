"""A server of gRPC that knows no messages, only bytes. Arguments: where to listen, its name, certificate, key."""

import sys
import time
from concurrent import futures

import grpc


def say(request, context):
    context.set_trailing_metadata((("x-by", NAME),))
    return request.upper()


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today: " + request.decode())


def sleep(request, context):
    time.sleep(float(request))
    return b"slept"


def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number


def add(requests, context):
    return b"%d" % sum(int(request) for request in requests)


def turns(requests, context):
    for request in requests:
        yield request[::-1]


def who(request, context):
    return b" ".join(sorted(key.encode() for key, _ in context.invocation_metadata() if key.startswith("x-")))


LISTEN, NAME, CERTIFICATE, KEY = sys.argv[1:]
KINDS = {
    "Say": grpc.unary_unary_rpc_method_handler(say),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
    "Who": grpc.unary_unary_rpc_method_handler(who),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Add": grpc.stream_unary_rpc_method_handler(add),
    "Turns": grpc.stream_stream_rpc_method_handler(turns),
}
server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Shop", KINDS),))
with open(KEY, "rb") as key, open(CERTIFICATE, "rb") as certificate:
    shown = grpc.ssl_server_credentials([(key.read(), certificate.read())])
if server.add_secure_port(LISTEN, shown) == 0:
    sys.exit("cannot listen on " + LISTEN)
server.start()
server.wait_for_termination()
