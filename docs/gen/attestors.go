package main

import (
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/server"
)

const attestorsHead = `# Attestors

<!-- Made by "make generate" from the attestors themselves. -->

## Of nodes

What an identity is worth is what one needs to pass for the node that has it. A
running server says the same of the attestors that it has, and which of them are
configured:

` + "```sh\nhallmark node attestors\n```" + `

`

const attestorsTail = `
[Plugins](../how-to/plugins.md) that were written for SPIRE attest nodes, too.

## Of workloads

| attestor | by |
|---|---|
| [unix](unix.md) | what the kernel says of the process |
| [docker, podman](docker.md) | the container that it runs in |
| [systemd](systemd.md) | the unit of systemd that it runs in |
| [k8s](k8s.md) | the pod and the container of Kubernetes that it runs in |
| [plugins](../how-to/plugins.md) | a program that was written for SPIRE |
`

// attestorsPage is the index of the attestors.
func attestorsPage() []byte {
	var b bytes.Buffer
	b.WriteString(attestorsHead)
	all := server.NodeAttestors()
	slices.Reverse(all)
	b.WriteString("| attestor | strength | needed to pass for a node |\n|---|---|---|\n")
	for _, a := range all {
		fmt.Fprintf(&b, "| [%s](%s) | %s | %s |\n", a.Name, path.Base(a.Page), a.Strength, a.Needed)
	}
	b.WriteString("\n| strength | one needs |\n|---|---|\n")
	for s := attestors.Hardware; s >= attestors.Unknown; s-- {
		fmt.Fprintf(&b, "| %s | %s |\n", s, s.Meaning())
	}
	b.WriteString("\nNodes get these selectors:\n\n| selector | meaning |\n|---|---|\n")
	for _, a := range all {
		for _, f := range a.Selectors {
			fmt.Fprintf(&b, "| `%s:%s` | %s |\n", a.Name, f.Value, strings.ReplaceAll(f.Meaning, "|", `\|`))
		}
	}
	b.WriteString(attestorsTail)
	return b.Bytes()
}
