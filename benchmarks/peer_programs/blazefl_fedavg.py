"""FedAvg in BlazeFL; clients one after another, or in a pool of threads."""

import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgThreadPoolClientTrainer
from blazefl.core import ModelSelector, PartitionedDataset
from blazefl.reproducibility import setup_reproducibility
from torch.utils.data import DataLoader, TensorDataset
from torch_networks import SETTING, clients_data, network, print_round


class Networks(ModelSelector):
    def select_model(self, model_name):
        return network()


class Clients(PartitionedDataset):
    def __init__(self):
        self.images, self.labels = clients_data()

    def get_dataset(self, type_, cid):
        return TensorDataset(self.images[cid], self.labels[cid])

    def get_dataloader(self, type_, cid, batch_size=None, generator=None):
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=True, generator=generator)


setup_reproducibility(0)
shared = {"model_selector": Networks(), "model_name": "cnn", "dataset": Clients(), "device": "cpu", "seed": 0}
shared |= {"num_clients": SETTING["clients"], "batch_size": SETTING["batch"]}
server = FedAvgBaseServerHandler(
    **shared, global_round=SETTING["rounds"], sample_ratio=SETTING["cohort"] / SETTING["clients"]
)
if SETTING["threads"]:
    torch.set_num_threads(1)
    trainer = FedAvgThreadPoolClientTrainer(**shared, epochs=1, lr=SETTING["rate"], num_parallels=SETTING["threads"])
else:
    trainer = FedAvgBaseClientTrainer(**shared, epochs=1, lr=SETTING["rate"])
while not server.if_stop():
    sampled, package = server.sample_clients(), server.downlink_package()
    trainer.local_process(package, sampled)
    for upload in trainer.uplink_package():
        server.load(upload)
    print_round(server.round)
