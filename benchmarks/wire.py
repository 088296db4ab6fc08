"""How fast is the wire? One flat float32 array pushed and pulled, beside raw TCP sockets and a naive unary RPC, in one run.

    python benchmarks/wire.py [--megabytes 100] [--repetitions 7] [--pings 500] [--json FILE]

Every server is a process of its own on loopback, all with the allocator tuning of `optserve serve`; so is this one, the client.

    socket    raw TCP, 1 MiB sends, received into an array that is there
    stream    the product's channel, options, codec and thread pools; the handler only copies chunks into place
    optserve  worker.push() and worker.pull(out=...) of a job: with the client's and the server's checks, the fold and the norm
    unary     one message with one bytes field, as one writes it first: tobytes() here, frombuffer() and a copy there

`optserve push` applies no update: rank 0 votes "not finite" beforehand, so the round of rank 1, which is timed, is skipped once
its gradient is checked and folded. (benchmarks/step.py times whole steps.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue
from serving import served

from optserve.client import connect
from optserve.client._channel import STREAM, GrpcTransport
from optserve.client._transport import Outgoing, Stream
from optserve.server import interceptors
from optserve.server.app import allocator
from optserve.server.app.app import OPTIONS
from optserve.v1 import data_pb2, types_pb2
from optserve.wire.chunks import CHUNK_BYTES, Chunk, array_chunks, parse

Call = Callable[[], object]

_NAIVE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_END = data_pb2.StreamRequest(end=types_pb2.StreamEnd())
_PULL = data_pb2.StreamRequest(pull=data_pb2.PullWeights())
_ENDED = data_pb2.StreamResponse(end=types_pb2.StreamEnd())

# Peers, each in its own process -----------------------------------------------------------------------------------------------


def socket_server(report: Connection, nbytes: int) -> None:
    allocator.tune()
    place = memoryview(bytearray(nbytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        report.send(listener.getsockname()[1])
        with listener.accept()[0] as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while wanted := peer.recv(1):
                if wanted == b"<":
                    receive_into(peer, place)
                    peer.sendall(b".")
                else:
                    send(peer, place)


def send(peer: socket.socket, data: memoryview) -> None:
    for offset in range(0, len(data), CHUNK_BYTES):
        peer.sendall(data[offset : offset + CHUNK_BYTES])


def receive_into(peer: socket.socket, place: memoryview) -> None:
    at = 0
    while at < len(place):
        count = peer.recv_into(place[at:])
        if not count:
            raise ConnectionError("the peer went away")
        at += count


def stream_server(report: Connection, nbytes: int) -> None:
    """The product's stream with a handler that only moves bytes."""
    allocator.tune()
    pool = ThreadPoolExecutor(8)
    place = np.zeros(nbytes, np.uint8)

    def stream(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[data_pb2.StreamResponse | Chunk]:
        for raw in requests:
            item = parse(data_pb2.StreamRequest, raw)
            if isinstance(item, Chunk):
                place[item.offset : item.offset + item.data.nbytes] = np.frombuffer(item.data, np.uint8)
            else:
                if item.HasField("pull"):
                    yield from array_chunks(0, place.data)
                yield _ENDED

    server = grpc.server(pool, options=OPTIONS)
    server.add_generic_rpc_handlers(interceptors.handlers({STREAM: stream}, lambda _: pool))
    serve(server, report)


def unary_server(report: Connection, nbytes: int) -> None:
    allocator.tune()
    place = np.zeros(nbytes, np.uint8)

    def push(request: BytesValue, _: grpc.ServicerContext) -> BytesValue:
        place[:] = np.frombuffer(request.value, np.uint8)
        return BytesValue()

    def pull(_: BytesValue, __: grpc.ServicerContext) -> BytesValue:
        return BytesValue(value=place.tobytes())

    def unary(behaviour: Callable[[BytesValue, grpc.ServicerContext], BytesValue]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(behaviour, BytesValue.FromString, BytesValue.SerializeToString)

    server = grpc.server(ThreadPoolExecutor(8), options=_NAIVE)
    methods = {"Push": unary(push), "Pull": unary(pull), "Ping": unary(lambda request, _: request)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Naive", methods)])
    serve(server, report)


def serve(server: grpc.Server, report: Connection) -> None:
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    report.send(port)
    report.poll(None)


@contextmanager
def peer(target: Callable[..., None], *arguments: int) -> Iterator[Connection]:
    """A process that runs the target; the connection to it, once it has something to report."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    try:
        if not here.poll(60):
            raise TimeoutError(f"{target.__name__} did not start within 60 s")
        yield here
    finally:
        process.kill()
        process.join()


# Ways: a push and a pull each, and what to do before a push -------------------------------------------------------------------


class Way:
    """One way to move the array; `push` and `pull` are timed, `before_push` is not."""

    def __init__(self, name: str, push: Call, pull: Call, before_push: Call = lambda: None) -> None:
        self.name, self.push, self.pull, self.before_push = name, push, pull, before_push


def socket_way(stack: ExitStack, source: memoryview, into: memoryview) -> Way:
    port = stack.enter_context(peer(socket_server, len(source))).recv()
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def push() -> None:
        connection.sendall(b"<")
        send(connection, source)
        receive_into(connection, memoryview(bytearray(1)))

    def pull() -> None:
        connection.sendall(b">")
        receive_into(connection, into)

    return Way("socket", push, pull)


def answered(stream: Stream, items: list[Outgoing] | Iterator[Outgoing]) -> Iterator[Chunk]:
    """The chunks that answer a request."""
    stream.send(items)
    while isinstance(item := stream.receive(60), Chunk):
        yield item


def stream_way(stack: ExitStack, source: memoryview, into: memoryview) -> tuple[Way, Call]:
    port = stack.enter_context(peer(stream_server, len(source))).recv()
    transport = GrpcTransport(f"127.0.0.1:{port}")
    stack.callback(transport.close)
    stream = transport.stream()
    stack.callback(stream.close)
    place = np.frombuffer(into, np.uint8)

    def request() -> Iterator[Outgoing]:
        yield from array_chunks(0, source)
        yield _END

    def push() -> None:
        list(answered(stream, request()))

    def pull() -> None:
        for chunk in answered(stream, [_PULL]):
            place[chunk.offset : chunk.offset + chunk.data.nbytes] = np.frombuffer(chunk.data, np.uint8)

    return Way("stream", push, pull), lambda: list(answered(stream, [_END]))


def unary_call(channel: grpc.Channel, name: str) -> Callable[[BytesValue], BytesValue]:
    return channel.unary_unary(f"/Naive/{name}", BytesValue.SerializeToString, BytesValue.FromString)  # type: ignore[no-any-return]


def unary_client(orders: Connection, nbytes: int, port: int) -> None:
    """Does what it is told, in a process of its own: what 100 MB messages leave of a heap slows down whatever comes next."""
    allocator.tune()
    source, place = np.random.default_rng(0).bytes(nbytes), np.zeros(nbytes, np.uint8)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=_NAIVE) as channel:
        orders.send("ready")
        while order := orders.recv():
            if order == "Push":
                unary_call(channel, order)(BytesValue(value=memoryview(source).tobytes()))
            else:
                place[:] = np.frombuffer(unary_call(channel, order)(BytesValue()).value, np.uint8)
            orders.send("done")


def unary_way(stack: ExitStack, nbytes: int) -> tuple[Way, Call]:
    port = stack.enter_context(peer(unary_server, nbytes)).recv()
    client = stack.enter_context(peer(unary_client, nbytes, port))
    client.recv()
    ping = unary_call(stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}")), "Ping")

    def order(name: str) -> None:
        client.send(name)
        client.recv()

    return Way("unary", lambda: order("Push"), lambda: order("Pull")), lambda: ping(BytesValue())


def optserve_way(stack: ExitStack, address: str, gradient: np.ndarray[Any, Any]) -> tuple[Way, Call]:
    server = stack.enter_context(connect(address))
    job = server.create_job("wire", {"w": gradient}, optimizer="sgd", lr=0.0, workers=2, on_nonfinite="skip")
    veto, worker = (stack.enter_context(job.join(rank=rank)) for rank in range(2))
    small = server.create_job("small", {"w": np.zeros(10, np.float32)}, optimizer="adam")
    tiny = stack.enter_context(small.join())
    gradients, out = {"w": gradient}, worker.pull()
    ten, weights = {"w": np.ones(10, np.float32)}, tiny.pull()
    nonfinite = {"w": np.full_like(gradient, np.nan)}
    pool = stack.enter_context(ThreadPoolExecutor(1))
    vetoes: list[Future[Any]] = []

    def before() -> None:
        vetoes.append(pool.submit(veto.push, nonfinite))
        time.sleep(0.1)

    def push() -> None:
        worker.push(gradients)

    return Way("optserve", push, lambda: worker.pull(out=out), before), lambda: tiny.push_pull(ten, out=weights)


# Measuring --------------------------------------------------------------------------------------------------------------------


def timed(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rates(ways: list[Way], nbytes: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Median GB/s by direction and way; the ways take turns, after one round that is not counted."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for repetition in range(-1, repetitions):
        for way in ways:
            way.before_push()
            found = {"push": timed(way.push), "pull": timed(way.pull)}
            for direction, taken in found.items() if repetition >= 0 else ():
                seconds.setdefault((direction, way.name), []).append(taken)
    return {
        direction: {way.name: nbytes / 1e9 / statistics.median(seconds[direction, way.name]) for way in ways}
        for direction in ("push", "pull")
    }


def latencies(calls: dict[str, Call], count: int) -> dict[str, dict[str, float]]:
    """Microseconds, p50 and p99; the calls take turns in blocks of 50."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    while min(map(len, taken.values())) < count:
        for name, call in calls.items():
            taken[name] += [timed(call) * 1e6 for _ in range(min(50, count))]
    return {
        name: {"p50": float(np.percentile(found, 50)), "p99": float(np.percentile(found, 99))} for name, found in taken.items()
    }


def measure(nbytes: int, repetitions: int, pings: int) -> dict[str, Any]:
    gradient = np.random.default_rng(0).standard_normal(nbytes // 4, np.float32)
    source, into = gradient.view(np.uint8).data, np.zeros(gradient.nbytes, np.uint8).data
    with ExitStack() as stack:
        streamed, stream_ping = stream_way(stack, source, into)
        unary, unary_ping = unary_way(stack, gradient.nbytes)
        product, push_pull = optserve_way(stack, stack.enter_context(served()), gradient)
        ways = [socket_way(stack, source, into), streamed, product, unary]
        found = rates(ways, gradient.nbytes, repetitions)
        pings_us = latencies({"unary": unary_ping, "stream": stream_ping, "push_pull": push_pull}, pings)
    return {
        "ratio_to_socket": {d: {name: rate / of["socket"] for name, rate in of.items()} for d, of in found.items()},
        "gigabytes_per_second": found,
        "push_pull_of_10_to_unary_ping": pings_us["push_pull"]["p50"] / pings_us["unary"]["p50"],
        "microseconds": pings_us,
        "megabytes": gradient.nbytes / 1e6,
        "repetitions": repetitions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, gRPC {grpc.__version__}",
    }


def table(result: dict[str, Any]) -> str:
    names = list(result["ratio_to_socket"]["push"])
    lines = [f"{result['megabytes']:.0f} MB, median of {result['repetitions']}, {result['machine']}"]
    lines.append(f"{'':14}" + "".join(f"{name:>10}" for name in names))
    for title, rows, digits in (("x socket", "ratio_to_socket", 2), ("GB/s", "gigabytes_per_second", 2)):
        for direction, of in result[rows].items():
            lines.append(f"{direction + ' ' + title:14}" + "".join(f"{of[name]:10.{digits}f}" for name in names))
    lines.append(f"push_pull of 10 floats: {result['push_pull_of_10_to_unary_ping']:.2f} x an empty unary call")
    for name, of in result["microseconds"].items():
        lines.append(f"  {name:10} p50 {of['p50']:7.0f} us   p99 {of['p99']:7.0f} us")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pings", type=int, default=500, help="of each kind")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    allocator.tune()
    result = measure(int(chosen.megabytes * 1e6) // 4 * 4, chosen.repetitions, chosen.pings)
    print(table(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
