package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// purged is a node that a purge concerns, as the command prints it.
type purged struct {
	ID        string     `json:"id"`
	ExpiredAt *time.Time `json:"expired_at"`
	Outcome   string     `json:"outcome"` // purged, failed, or would be purged
	Reason    string     `json:"reason,omitempty"`
}

func (a *app) nodePurge() *cobra.Command {
	expiredFor := duration{config.Duration(24 * time.Hour)}
	var others, dryRun bool
	cmd := &cobra.Command{
		Use:   "purge",
		Short: "forget agents whose SVIDs ended long ago",
		Long: "Purge removes agents whose SVIDs ended some time ago from the registry. It leaves\n" +
			"banned ones, as their bans would be lifted, and those that cannot attest again by\n" +
			"themselves, unless told otherwise.",
		Example: "  hallmark node purge --dry-run\n  hallmark node purge --expired-for 30d --include-non-reattestable --yes",
		Args:    noArguments,
	}
	cmd.Flags().Var(&expiredFor, "expired-for", "only those whose SVID ended this `time` ago")
	cmd.Flags().BoolVar(&others, "include-non-reattestable", false, "those too that need a new join token to come back")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be done")
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		before := a.now().Add(-time.Duration(expiredFor.Duration))
		filter := &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false), ByExpiresBefore: before.Format("2006-01-02 15:04:05 -0700 -07")}
		if !others {
			filter.ByCanReattest = wrapperspb.Bool(true)
		}
		nodes, err := listNodes(ctx, c, &agentv1.ListAgentsRequest{Filter: filter, PageSize: nodePage})
		if err != nil {
			return err
		}
		// Whatever the server makes of the filter, nothing else is deleted.
		nodes = slices.DeleteFunc(nodes, func(n *types.Agent) bool {
			return n.Banned || n.X509SvidExpiresAt == 0 || n.X509SvidExpiresAt >= before.Unix() || !others && !n.CanReattest
		})
		items := make([]purged, len(nodes))
		for i, n := range nodes {
			items[i] = purged{ID: idText(n.Id), ExpiredAt: timestamp(n.X509SvidExpiresAt), Outcome: "would be purged"}
		}
		if len(items) == 0 && a.output == outputTable {
			a.remark("No agents to purge.")
			return nil
		}
		var errs []error
		if !dryRun && len(items) > 0 {
			what := fmt.Sprintf("This will purge %s that expired before %s; \"--dry-run\" lists them.", count(len(items), "agent", "agents"), before.UTC().Format(time.RFC3339))
			if err := a.confirm(*yes, true, what); err != nil {
				return err
			}
			for i, n := range nodes {
				if err := c.purge(ctx, n, before); err != nil {
					err = rpcError("purge "+items[i].ID, err)
					items[i].Outcome, items[i].Reason = "failed", err.Error()
					errs = append(errs, err)
					continue
				}
				items[i].Outcome = "purged"
			}
		}
		if err := a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"AGENT", "SVID EXPIRED", "OUTCOME"}}
			for _, n := range items {
				t.add(painted(a.style.bold, n.ID), text(a.relative(*n.ExpiredAt)), text(n.Outcome))
			}
			io.WriteString(w, t.String())
		}); err != nil {
			return err
		}
		return joined(errs)
	}
	return cmd
}

// purge deletes a node, unless it has come back since it was listed.
func (c *admin) purge(ctx context.Context, n *types.Agent, before time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now, err := c.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: n.Id})
	switch {
	case err != nil:
		return err
	case now.Banned || now.X509SvidExpiresAt >= before.Unix():
		return fmt.Errorf("it has changed since it was listed; it stays")
	}
	_, err = c.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: n.Id})
	return err
}
