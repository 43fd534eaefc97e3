"""Which of a run's nodes (machines) this process is on."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from hft_cli.config.schema import EngineConfig
from hft_cli.errors import UserError


@dataclass(frozen=True)
class Node:
    """This node, and where node 0 can be reached.

    Attributes:
        rank: number of this node, from 0.
        count: number of nodes.
        host, port: address of node 0. The nodes meet at `port`, torchrun's ranks at `port` + 1.
    """

    rank: int
    count: int
    host: str
    port: int

    def torchrun_options(self) -> list[str]:
        """Options of torchrun on this node. Ranks are numbered in the order of the nodes."""
        return [
            "--nnodes", str(self.count), "--node_rank", str(self.rank),
            "--master_addr", self.host, "--master_port", str(self.port + 1),
        ]  # fmt: skip


def this_node(engine: EngineConfig) -> Node | None:
    """This node, as engine.node_rank, torchrun or srun numbers it; None for a run on one node.

    Raises:
        UserError: if the number or the address of node 0 is not known, or several processes were started on this node.
    """
    _refuse_several_processes(engine)
    if engine.num_nodes == 1:
        return None
    numbers = (engine.node_rank, os.environ.get("GROUP_RANK"), os.environ.get("SLURM_NODEID"))
    rank = next((int(number) for number in numbers if number is not None), None)
    if rank is None:
        raise UserError(
            f"engine.num_nodes={engine.num_nodes}: which node is this? Give engine.node_rank=0 here and 1, … on the "
            "others, or start the command by srun (one task on each node) or torchrun."
        )
    if rank >= engine.num_nodes:
        raise UserError(f"This is node {rank}, counted from 0, but engine.num_nodes={engine.num_nodes}.")
    if engine.rendezvous is None:
        raise UserError(
            f"engine.num_nodes={engine.num_nodes} needs engine.rendezvous=HOST:PORT, where the others reach node 0."
        )
    host, _, port = engine.rendezvous.rpartition(":")
    if not 1024 <= int(port) < 65535:
        raise UserError(f"engine.rendezvous={engine.rendezvous}: the port must be from 1024 to 65534.")
    return Node(rank, engine.num_nodes, host, int(port))


def _refuse_several_processes(engine: EngineConfig) -> None:
    """hft starts the ranks of a node itself.

    Raises:
        UserError: if torchrun or srun has started several processes of this command on one node.
    """
    started = {"torchrun": "LOCAL_WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}
    numbers = {name: int(os.environ.get(key) or 1) for name, key in started.items()}
    if numbers["torchrun"] > 1 or (engine.num_nodes == 1 and numbers["srun"] > 1):
        starter = max(numbers, key=lambda name: numbers[name])
        raise UserError(
            f"{starter} has started {numbers[starter]} processes of this command, but hft starts its ranks itself. "
            "Start one on each node: engine.num_processes=GPUS engine.num_nodes=NODES."
        )
    if engine.num_nodes > 1 and numbers["srun"] not in (1, engine.num_nodes):
        raise UserError(
            f"srun has started {numbers['srun']} tasks for engine.num_nodes={engine.num_nodes}: start one task on each "
            "node (srun --ntasks-per-node=1)."
        )


def is_free(port: int) -> bool:
    """Whether no process on this machine listens on the port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
