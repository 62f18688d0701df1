package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const nodePage = 1000 // nodes asked for at once

func (a *app) nodeCommand() *cobra.Command {
	return noun("node", "see and remove the nodes that agents attested",
		"A node is known by its agent, which attested to the server. An agent is named by its\n"+
			"SPIFFE ID, or by what follows /spire/agent/ in it.",
		"  hallmark node list\n  hallmark node show join_token/4f1c\n  hallmark node evict join_token/4f1c",
		a.nodeList(), a.nodeShow(), a.nodeAttestors(), a.nodeEvict(), a.nodeBan(), a.nodePurge(), a.nodeWait())
}

// nodeItem is a node as commands print it.
type nodeItem struct {
	ID                   string     `json:"id"`
	State                string     `json:"state"` // connected, offline, expired or banned
	AttestationType      string     `json:"attestation_type"`
	Selectors            []string   `json:"selectors"`
	SerialNumber         string     `json:"serial_number"`
	ExpiresAt            *time.Time `json:"expires_at"`
	Banned               bool       `json:"banned"`
	CanReattest          bool       `json:"can_reattest"`
	AgentVersion         string     `json:"agent_version"`
	Connected            bool       `json:"connected"` // holds a push stream to this server
	ConnectedAt          *time.Time `json:"connected_at"`
	Address              string     `json:"address"`
	AcknowledgedRevision int64      `json:"acknowledged_revision"`
}

// nodeOf joins what the registry knows of a node with its connection, which
// may be nil.
func (a *app) nodeOf(n *types.Agent, c *hallmarkv1.Connection) nodeItem {
	out := nodeItem{
		ID: idText(n.Id), AttestationType: n.AttestationType, Selectors: selectorTexts(n.Selectors),
		SerialNumber: n.X509SvidSerialNumber, ExpiresAt: timestamp(n.X509SvidExpiresAt),
		Banned: n.Banned, CanReattest: n.CanReattest, AgentVersion: n.AgentVersion,
	}
	switch {
	case n.Banned:
		out.State = "banned"
	case c != nil:
		out.State = "connected"
	case out.ExpiresAt != nil && !a.now().Before(*out.ExpiresAt):
		out.State = "expired"
	default:
		out.State = "offline"
	}
	if c != nil {
		out.Connected, out.ConnectedAt, out.Address = true, timestamp(c.ConnectedAt), c.Address
		out.AcknowledgedRevision = c.AcknowledgedRevision
		if out.AgentVersion == "" {
			out.AgentVersion = c.AgentVersion
		}
	}
	return out
}

func (a *app) paintState(state string) func(string) string {
	switch state {
	case "connected":
		return a.style.green
	case "banned":
		return a.style.red
	case "expired":
		return a.style.yellow
	}
	return a.style.dim
}

// connections returns the agents that hold a push stream to this server.
func connections(ctx context.Context, c *admin) (map[string]*hallmarkv1.Connection, error) {
	resp, err := c.server().ListConnections(ctx, &hallmarkv1.ListConnectionsRequest{})
	if err != nil {
		return nil, rpcError("list connections", err)
	}
	out := make(map[string]*hallmarkv1.Connection, len(resp.Connections))
	for _, conn := range resp.Connections {
		out[conn.AgentId] = conn
	}
	return out, nil
}

func (a *app) nodeList() *cobra.Command {
	var attestor string
	var banned bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list nodes",
		Long: "List prints the nodes that attested, and which of them are connected to this server,\n" +
			"with the revision of the registry up to which they have acknowledged all changes.",
		Example: "  hallmark node list\n  hallmark node list --banned\n  hallmark node list -o json | jq -r '.[] | select(.connected | not).id'",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&attestor, "type", "", "only those that this `attestor` attested, like join_token")
	cmd.Flags().BoolVar(&banned, "banned", false, "only banned ones; =false for only the others")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		req := &agentv1.ListAgentsRequest{Filter: &agentv1.ListAgentsRequest_Filter{ByAttestationType: attestor}, PageSize: nodePage}
		if cmd.Flags().Changed("banned") {
			req.Filter.ByBanned = wrapperspb.Bool(banned)
		}
		agents, err := listNodes(ctx, c, req)
		if err != nil {
			return err
		}
		connected, err := connections(ctx, c)
		if err != nil {
			return err
		}
		items := make([]nodeItem, len(agents))
		for i, n := range agents {
			items[i] = a.nodeOf(n, connected[idText(n.Id)])
		}
		if len(items) == 0 && a.output == outputTable {
			a.remark("No nodes. \"hallmark token generate\" makes a join string for one.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"AGENT", "STATE", "REVISION", "SVID EXPIRES", "VERSION", "ADDRESS"}}
			for _, n := range items {
				expires := "never"
				if n.ExpiresAt != nil {
					expires = a.relative(*n.ExpiresAt)
				}
				revision := ""
				if n.Connected {
					revision = fmt.Sprint(n.AcknowledgedRevision)
				}
				t.add(painted(a.style.bold, n.ID), painted(a.paintState(n.State), n.State), text(revision), text(expires), text(n.AgentVersion), text(n.Address))
			}
			io.WriteString(w, t.String())
		})
	}
	return cmd
}

func listNodes(ctx context.Context, c *admin, req *agentv1.ListAgentsRequest) ([]*types.Agent, error) {
	var out []*types.Agent
	for {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.agents().ListAgents(callCtx, req)
		cancel()
		if err != nil {
			return nil, rpcError("list nodes", err)
		}
		out = append(out, resp.Agents...)
		if resp.NextPageToken == "" {
			return out, nil
		}
		req.PageToken = resp.NextPageToken
	}
}

func (a *app) nodeShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show AGENT",
		Short:             "show a node whole",
		Long:              "Show prints all that the server knows of a node.",
		Example:           "  hallmark node show join_token/4f1c\n  hallmark node show spiffe://example.org/spire/agent/join_token/4f1c -o yaml",
		Args:              arguments(1, 1, "an agent"),
		ValidArgsFunction: a.completeNodes(1),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		id, err := c.node(ctx, args[0])
		if err != nil {
			return err
		}
		n, err := c.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
		if err != nil {
			return rpcError("show node "+idText(id), err)
		}
		connected, err := connections(ctx, c)
		if err != nil {
			return err
		}
		item := a.nodeOf(n, connected[idText(n.Id)])
		return a.print(item, func(w io.Writer) {
			d := details{style: a.style}
			d.addPainted("Agent", a.style.bold, item.ID)
			d.addPainted("State", a.paintState(item.State), item.State)
			if item.Connected {
				d.add("Connected", fmt.Sprintf("%s, from %s, revision %d", a.moment(*item.ConnectedAt), item.Address, item.AcknowledgedRevision))
			}
			d.add("Attested by", item.AttestationType)
			d.add("Selectors", item.Selectors...)
			if item.ExpiresAt != nil {
				d.add("SVID expires", a.moment(*item.ExpiresAt))
			}
			d.add("SVID serial", item.SerialNumber)
			reattest := "no; once its SVID has ended it needs a new join token, or to be evicted if it attests by other means"
			if item.CanReattest {
				reattest = "yes"
			}
			d.add("Can attest again", reattest)
			d.add("Version", item.AgentVersion)
			io.WriteString(w, d.String())
		})
	}
	return cmd
}

func (a *app) nodeEvict() *cobra.Command {
	return a.nodeRemoval(removal{
		use: "evict", done: "evicted",
		short: "forget agents; they may attest again",
		long: "Evict removes agents from the registry: at once they get nothing more, and their\n" +
			"streams end. An agent may attest again if its attestor allows that, or with a new\n" +
			"join token. Evicting a banned agent lifts the ban. What its workloads have stays good until\n" +
			"it ends, unless --revoke is given.",
		warn: "Evicted agents lose all identities until they attest again, which one that joined with a token can only do with a new one.",
		call: func(ctx context.Context, c *admin, id *types.SPIFFEID) error {
			_, err := c.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
			return err
		},
	})
}

func (a *app) nodeBan() *cobra.Command {
	return a.nodeRemoval(removal{
		use: "ban", done: "banned", irreversible: true,
		short: "refuse agents from now on",
		long: "Ban keeps agents in the registry as refused: at once they get nothing more, their\n" +
			"streams end, and they may not attest again. What its workloads have stays good until it\n" +
			"ends, unless --revoke is given. To lift a ban, evict the agent.",
		warn: "Banned agents lose all identities at once and stop. They may not attest again.",
		call: func(ctx context.Context, c *admin, id *types.SPIFFEID) error {
			_, err := c.agents().BanAgent(ctx, &agentv1.BanAgentRequest{Id: id})
			return err
		},
	})
}

// removal is a command that takes nodes away.
type removal struct {
	use, done, short, long, warn string
	irreversible                 bool // it needs --yes where nobody can be asked
	call                         func(context.Context, *admin, *types.SPIFFEID) error
}

func (a *app) nodeRemoval(r removal) *cobra.Command {
	cmd := &cobra.Command{
		Use:               r.use + " AGENT...",
		Short:             r.short,
		Long:              r.long,
		Example:           "  hallmark node " + r.use + " join_token/4f1c\n  hallmark node " + r.use + " --yes spiffe://example.org/spire/agent/join_token/4f1c",
		Args:              arguments(1, -1, "an agent"),
		ValidArgsFunction: a.completeNodes(-1),
	}
	revoke := cmd.Flags().Bool("revoke", false, "also revoke the agents' SVIDs, and all that was issued through them until now")
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		ids := make([]*types.SPIFFEID, len(args))
		names := make([]string, len(args))
		for i, arg := range args {
			if ids[i], err = c.node(cmd.Context(), arg); err != nil {
				return err
			}
			names[i] = idText(ids[i])
		}
		what := fmt.Sprintf("This will %s %s:\n%s\n%s", r.use, count(len(ids), "agent", "agents"), indent(strings.Join(names, "\n"), "  "), r.warn)
		if err := a.confirm(*yes, r.irreversible, what); err != nil {
			return err
		}
		var errs []error
		for i, id := range ids {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			err := r.call(ctx, c, id)
			cancel()
			if err != nil {
				errs = append(errs, rpcError(r.use+" "+names[i], err))
				continue
			}
			fmt.Fprintf(a.out, "%s %s\n", r.done, names[i])
			if *revoke {
				ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout+revokeMargin)
				err := a.revoke(ctx, c, &hallmarkv1.RevokeSVIDsRequest{Revocations: []*hallmarkv1.Revocation{{NodeId: names[i], Reason: reasons["privilegeWithdrawn"]}}})
				cancel()
				if err != nil {
					errs = append(errs, err)
				}
			}
		}
		return joined(errs)
	}
	return cmd
}

// completeNodes completes agents by what follows /spire/agent/.
func (a *app) completeNodes(most int) completer {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.completeFromServer(cmd, typed, func(ctx context.Context, c *admin) (all []string, err error) {
			resp, err := c.agents().ListAgents(ctx, &agentv1.ListAgentsRequest{OutputMask: &types.AgentMask{Banned: true}, PageSize: completionItems})
			for _, n := range resp.GetAgents() {
				all = append(all, strings.TrimPrefix(n.GetId().GetPath(), agentPath))
			}
			return all, err
		})
	}
}
