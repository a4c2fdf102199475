"""FedAvg in pfl-research's simulation."""

import types

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch_networks import SETTING, clients_data, network, print_round


class Tell(TrainingProcessCallback):
    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        print_round(central_iteration + 1)
        return False, Metrics()


def loss(self, inputs, targets, eval=False):
    self.eval() if eval else self.train()
    return torch.nn.functional.cross_entropy(self(inputs), targets)


def metrics(self, inputs, targets, eval=True):
    return {"loss": Weighted(self.loss(inputs, targets).item() * len(inputs), len(inputs))}


images, labels = clients_data()
users = [(images[client], labels[client]) for client in range(SETTING["clients"])]
dataset = FederatedDataset.from_slices(users, get_user_sampler("random", range(len(users))))
model = network()
model.loss, model.metrics = types.MethodType(loss, model), types.MethodType(metrics, model)
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=SETTING["rounds"],
        evaluation_frequency=10**9,
        train_cohort_size=SETTING["cohort"],
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=dataset, val_data=None, postprocessors=[WeightByUser()]),
    model=PyTorchModel(
        model=model,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(model.parameters(), 1.0),
    ),
    model_train_params=NNTrainHyperParams(
        local_learning_rate=SETTING["rate"], local_num_epochs=1, local_batch_size=SETTING["batch"]
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Tell()],
)
