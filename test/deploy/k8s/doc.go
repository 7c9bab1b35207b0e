// Package k8s renders what is under deploy/k8s, decodes it as strictly as an API server does, holds it to the Pod Security Standard
// restricted and to what the sidecar promises, and runs the pod of the demo as a kubelet would.
//
// It renders with the command that kubectl 1.37 has as `kubectl kustomize`, from its module: what distributions ship is too old to know components,
// and a machine need not have one.
package k8s
