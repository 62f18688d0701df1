package cli

import (
	"context"
	"fmt"
	"io"
	"math/big"
	"time"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// issuedItem is an SVID that was issued, as commands print it.
type issuedItem struct {
	Kind         string     `json:"kind"` // x509, jwt or wit
	SPIFFEID     string     `json:"spiffe_id"`
	SerialNumber string     `json:"serial_number"`
	State        string     `json:"state"` // valid or revoked
	IssuedAt     *time.Time `json:"issued_at"`
	ExpiresAt    *time.Time `json:"expires_at"`
	Node         string     `json:"node,omitempty"` // the agent that asked for it
	AuthorityID  string     `json:"authority_id"`
}

func issuedOf(all []*hallmarkv1.IssuedSVID) []issuedItem {
	items := make([]issuedItem, len(all))
	for i, s := range all {
		items[i] = issuedItem{s.Kind, s.SpiffeId, s.SerialNumber, "valid", timestamp(s.IssuedAt), timestamp(s.ExpiresAt), s.NodeId, s.AuthorityId}
		if s.Revoked {
			items[i].State = "revoked"
		}
	}
	return items
}

func (a *app) paintSVID(state string) func(string) string {
	if state == "revoked" {
		return a.style.red
	}
	return a.style.green
}

func (a *app) svidList() *cobra.Command {
	var id, node string
	var limit int32
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list what this server issued that has not ended",
		Long: "List prints the X509-SVIDs and other certificates that this server has issued and that have\n" +
			"not ended, and the JWT-SVIDs and WIT-SVIDs if they have a status (status_list_endpoint), the\n" +
			"newest first. Each server of a cluster lists its own.",
		Example: "  hallmark svid list\n  hallmark svid list --spiffe-id /web\n  hallmark svid list --node join_token/4f1c -o json",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only of this identity: `SPIFFE-ID` or just /PATH")
	cmd.Flags().StringVar(&node, "node", "", "only of this `AGENT` and through it")
	cmd.Flags().Int32Var(&limit, "limit", 1000, "at most so many, up to 10000")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		req := &hallmarkv1.ListSVIDsRequest{Limit: limit}
		if id != "" {
			of, err := c.id(ctx, "--spiffe-id", id)
			if err != nil {
				return err
			}
			req.SpiffeId = idText(of)
		}
		if node != "" {
			of, err := c.node(ctx, node)
			if err != nil {
				return err
			}
			req.NodeId = idText(of)
		}
		resp, err := c.server().ListSVIDs(ctx, req)
		if err != nil {
			return rpcError("list SVIDs", err)
		}
		items := issuedOf(resp.Svids)
		if len(items) == 0 && a.output == outputTable {
			a.remark("This server has issued none that has not ended.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"SPIFFE ID", "KIND", "SERIAL", "STATE", "EXPIRES", "THROUGH"}}
			for _, x := range items {
				t.add(painted(a.style.bold, x.SPIFFEID), text(x.Kind), text(x.SerialNumber), painted(a.paintSVID(x.State), x.State),
					text(a.relative(*x.ExpiresAt)), text(x.Node))
			}
			io.WriteString(w, t.String())
			if resp.Total > int64(len(items)) {
				a.remark("%d more; --limit shows them, --spiffe-id and --node fewer.", resp.Total-int64(len(items)))
			}
		})
	}
	return cmd
}

func (a *app) svidShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show SERIAL",
		Short:   "show what this server issued under a serial number",
		Long:    "Show prints whose a serial number is, decimal or in hexadecimal after 0x, and whether it is\nrevoked. Only the server that issued it knows.",
		Example: "  hallmark svid show 584727354153173098993893961261101180718031227294\n  hallmark svid show 0x66bf5a0e2b -o json",
		Args:    arguments(1, 1, "a serial number"),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		n, ok := new(big.Int).SetString(args[0], 0)
		if !ok {
			return usageError(fmt.Errorf("%q is no serial number", args[0]))
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ListSVIDs(ctx, &hallmarkv1.ListSVIDsRequest{SerialNumber: n.String()})
		if err != nil {
			return rpcError("show the SVID", err)
		}
		if len(resp.Svids) == 0 {
			return &failure{code: exitNotFound, err: fmt.Errorf("this server has issued no SVID with serial number %v that has not ended", n),
				remedy: "Each server knows its own; \"hallmark cluster list\" shows the others."}
		}
		item := issuedOf(resp.Svids)[0]
		return a.print(item, func(w io.Writer) {
			d := details{style: a.style}
			d.addPainted("SPIFFE ID", a.style.bold, item.SPIFFEID)
			d.add("Kind", item.Kind)
			d.addPainted("State", a.paintSVID(item.State), item.State)
			d.add("Serial number", item.SerialNumber)
			d.add("Issued", a.moment(*item.IssuedAt))
			d.add("Expires", a.moment(*item.ExpiresAt))
			d.add("Through", item.Node)
			d.add("Authority", item.AuthorityID)
			io.WriteString(w, d.String())
		})
	}
	return cmd
}
