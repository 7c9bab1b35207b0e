// Package deploy checks what is under deploy/, and the image: it builds, renders and loads them with the libraries that
// Kubernetes, Compose and registries are made of, and runs what is in them.
//
// It is a module of its own, so that these libraries are no dependencies of the product. Each folder is what one target of the
// Makefile runs: image, k8s and compose.
package deploy
