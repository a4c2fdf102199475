"""FedAvg in Flower's simulation engine."""

import os

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_networks import SETTING, clients_data, network, print_round

client_app, server_app, kept = ClientApp(), ServerApp(), {}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    if not kept:
        torch.set_num_threads(SETTING["cpus_per_client"])
        kept["data"], kept["model"] = clients_data(), network()
    model, (images, labels) = kept["model"], kept["data"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), message.content["config"]["rate"])
    client = int(context.node_config["partition-id"])
    for rows in torch.randperm(SETTING["examples"]).split(SETTING["batch"]):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[client, rows]), labels[client, rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": SETTING["examples"]})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_train=SETTING["cohort"] / SETTING["clients"], fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network().state_dict()),
        train_config=ConfigRecord({"rate": SETTING["rate"]}),
        num_rounds=SETTING["rounds"],
        evaluate_fn=lambda number, arrays: print_round(number) if number else None,
    )


if __name__ == "__main__":
    resources = {"num_cpus": SETTING["cpus_per_client"], "num_gpus": 0.0}
    backend = {"client_resources": resources, "init_args": {"num_cpus": os.cpu_count()}}
    run_simulation(server_app, client_app, num_supernodes=SETTING["clients"], backend_config=backend)
