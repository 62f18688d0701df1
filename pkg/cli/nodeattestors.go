package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// nodeAttestorItem is a way to attest nodes as commands print it.
type nodeAttestorItem struct {
	Name       string             `json:"name"`
	Configured bool               `json:"configured"`
	Strength   string             `json:"strength"` // unknown, network, bearer, key or hardware
	Needed     string             `json:"needed"`   // to pass for a node
	Selectors  []selectorFormItem `json:"selectors"`
	Page       string             `json:"page"`
}

type selectorFormItem struct {
	Form    string `json:"form"`
	Meaning string `json:"meaning"`
}

func nodeAttestorOf(a *hallmarkv1.NodeAttestor) nodeAttestorItem {
	out := nodeAttestorItem{
		Name: a.Name, Configured: a.Configured, Strength: a.Strength, Needed: a.Needed,
		Selectors: []selectorFormItem{}, Page: a.Page,
	}
	for _, s := range a.Selectors {
		out.Selectors = append(out.Selectors, selectorFormItem{s.Form, s.Meaning})
	}
	return out
}

func (a *app) nodeAttestors() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attestors [NAME...]",
		Short: "list the ways to attest nodes, and what each is worth",
		Long: "Attestors prints the node attestors that the server has, whether they are configured\n" +
			"or not, the weakest first: what one needs to pass for a node of each, and which\n" +
			"selectors nodes get. The strength is hardware (the node's own, whose key cannot be\n" +
			"copied), key (a private key in a file), bearer (a text that works for whoever shows\n" +
			"it), network (an answer at the node's address) or unknown (a plugin decides).",
		Example: "  hallmark node attestors\n  hallmark node attestors x509pop tpm_ek\n" +
			"  hallmark node attestors -o json | jq -r '.[] | select(.configured and .strength == \"bearer\").name'",
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: a.completeNodeAttestors,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ListNodeAttestors(ctx, &hallmarkv1.ListNodeAttestorsRequest{})
		if err != nil {
			return rpcError("list node attestors", err)
		}
		items := []nodeAttestorItem{}
		for _, one := range resp.NodeAttestors {
			if len(names) == 0 || slices.Contains(names, one.Name) {
				items = append(items, nodeAttestorOf(one))
			}
		}
		for _, name := range names {
			if !slices.ContainsFunc(items, func(i nodeAttestorItem) bool { return i.Name == name }) {
				return &failure{code: exitNotFound, err: fmt.Errorf("the server has no node attestor %q; \"hallmark node attestors\" shows those it has", name)}
			}
		}
		return a.print(items, func(w io.Writer) { a.writeNodeAttestors(w, items) })
	}
	return cmd
}

func (a *app) writeNodeAttestors(w io.Writer, items []nodeAttestorItem) {
	for i, item := range items {
		if i > 0 {
			fmt.Fprintln(w)
		}
		state, paint := "not configured", a.style.dim
		if item.Configured {
			state, paint = "configured", a.style.green
		}
		fmt.Fprintf(w, "%s  %s\n", a.style.bold(printable(item.Name)), paint(state))
		d := details{style: a.style}
		d.add("Strength", item.Strength)
		d.add("Needed to pass for a node", item.Needed)
		width := 0
		for _, s := range item.Selectors {
			width = max(width, utf8.RuneCountInString(s.Form))
		}
		selectors := make([]string, len(item.Selectors))
		for i, s := range item.Selectors {
			selectors[i] = s.Form + strings.Repeat(" ", width-utf8.RuneCountInString(s.Form)+2) + s.Meaning
		}
		d.add("Selectors", selectors...)
		d.add("Documentation", item.Page)
		io.WriteString(w, d.String())
	}
}

// completeNodeAttestors completes the names of node attestors.
func (a *app) completeNodeAttestors(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return a.completeFromServer(cmd, typed, func(ctx context.Context, c *admin) (all []string, err error) {
		resp, err := c.server().ListNodeAttestors(ctx, &hallmarkv1.ListNodeAttestorsRequest{})
		for _, one := range resp.GetNodeAttestors() {
			all = append(all, one.Name)
		}
		return all, err
	})
}
