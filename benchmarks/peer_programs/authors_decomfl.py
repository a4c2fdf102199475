"""DeComFL by its authors' code, whose checkout is on PYTHONPATH."""

import torch
from cezo_fl.client import ResetClient
from cezo_fl.gradient_estimators.random_gradient_estimator_splitted import RandomGradientEstimatorBatch
from cezo_fl.models.cnn_mnist import CNN_MNIST
from cezo_fl.server import CeZO_Server
from cezo_fl.util.metrics import accuracy
from torch.utils.data import DataLoader, TensorDataset
from torch_networks import SETTING, clients_data, print_round

torch.set_grad_enabled(False)
device, criterion = torch.device("cpu"), torch.nn.CrossEntropyLoss()


def tools():
    torch.manual_seed(0)
    model = CNN_MNIST()
    estimator = RandomGradientEstimatorBatch(
        model.parameters(), 1e-3, SETTING["perturbations"], grad_estimate_method="rge-forward", device=device
    )
    return model, torch.optim.SGD(model.parameters(), SETTING["rate"]), estimator


def client(images, labels):
    model, optimizer, estimator = tools()
    loader = DataLoader(TensorDataset(images, labels), SETTING["batch"], shuffle=True)
    return ResetClient(model, lambda model, x: model(x), loader, estimator, optimizer, criterion, accuracy, device)


clients = [client(*own) for own in zip(*clients_data(), strict=True)]
server = CeZO_Server(clients, device, SETTING["cohort"], SETTING["local_steps"])
model, optimizer, estimator = tools()
server.set_server_model_and_criterion(model, lambda model, x: model(x), criterion, accuracy, optimizer, estimator)
for number in range(SETTING["rounds"]):
    server.train_one_step(number)
    print_round(number + 1)
