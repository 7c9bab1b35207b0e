// Package image builds the image as `make image` does and looks at it as a registry, an engine and a node would.
package image
