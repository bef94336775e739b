"""Model, data and training."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import Normalize

normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Net(nn.Module):
    """Model (simple CNN adapted from 'PyTorch: A 60 Minute Blitz')"""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@lru_cache
def load_images(path: str):
    """Images in [0, 1], float32 (N, 3, 32, 32), and their labels."""
    with np.load(path) as file:
        return torch.from_numpy(file["images"]).float() / 255, torch.from_numpy(file["labels"])


def partition(path: str, partition_id: int, num_partitions: int):
    """A client's share: images and labels of its training part, then of its test part."""
    images, labels = load_images(path)
    mine = torch.arange(partition_id, len(labels), num_partitions)
    cut = int(0.8 * len(mine))
    return images[mine[:cut]], labels[mine[:cut]], images[mine[cut:]], labels[mine[cut:]]


def load_data(path: str, partition_id: int, num_partitions: int, batch_size: int):
    """Load a partition of the data."""
    train_x, train_y, test_x, test_y = partition(path, partition_id, num_partitions)
    trainloader = DataLoader(TensorDataset(normalize(train_x), train_y), batch_size=batch_size, shuffle=True)
    testloader = DataLoader(TensorDataset(normalize(test_x), test_y), batch_size=batch_size)
    return trainloader, testloader


def train(net, trainloader, epochs, lr, device):
    """Train the model on the training set."""
    net.to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader, device):
    """Validate the model on the test set."""
    net.to(device)
    criterion = torch.nn.CrossEntropyLoss()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images.to(device))
            loss += criterion(outputs, labels.to(device)).item()
            correct += (torch.max(outputs.data, 1)[1] == labels.to(device)).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)


__all__ = ["Net", "load_data", "partition", "test", "train"]
