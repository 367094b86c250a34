"""The same model elsewhere: conversion, the comparison of tensors and identities, the claims of notebook 00."""
