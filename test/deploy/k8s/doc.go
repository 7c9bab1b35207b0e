// Package k8s renders what is under deploy/k8s, decodes it as strictly as an API server does, holds it to the Pod Security Standard
// restricted and to what the sidecar promises, and runs the pod of the demo as a kubelet would.
//
// It renders with the library that kubectl is made of, and compares with kubectl where there is one: what distributions ship is too old.
package k8s
