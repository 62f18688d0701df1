package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (c *admin) cluster() hallmarkv1.ClusterServiceClient {
	return hallmarkv1.NewClusterServiceClient(c)
}

func (a *app) clusterCommand() *cobra.Command {
	return noun("cluster", "several servers that rule one trust domain",
		"The servers of a cluster share one store, and each can do all that a server does.\n"+
			"With \"store: {etcd: {}}\" in their configuration they keep it themselves.",
		"  hallmark cluster list\n  hallmark cluster invite\n  hallmark cluster remove server-b",
		a.clusterList(), a.clusterInvite(), a.clusterLeave(), a.clusterRemove())
}

// serverItem is a server of the cluster as commands print it.
type serverItem struct {
	Name        string     `json:"name"`
	Role        string     `json:"role,omitempty"` // follower, leader or learner; empty: the store is kept elsewhere
	Present     bool       `json:"present"`        // heard of in the last seconds
	Self        bool       `json:"self"`           // it is the one that answered
	Address     string     `json:"address,omitempty"`
	PeerAddress string     `json:"peer_address,omitempty"`
	Version     string     `json:"version,omitempty"`
	Revision    int64      `json:"revision,omitempty"`
	Since       *time.Time `json:"since,omitempty"`
	Leads       bool       `json:"leads"` // does what one of them has to do for all
}

func (a *app) clusterList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the servers of the cluster",
		Long: "List shows the servers, whether each is there, and which revision of the registry it\n" +
			"showed some seconds ago. A majority of them must be there for anything to be written.",
		Example: "  hallmark cluster list\n  hallmark cluster list -o json",
		Args:    noArguments,
	}
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
		resp, err := c.cluster().ListServers(ctx, &hallmarkv1.ListServersRequest{})
		if err != nil {
			return rpcError("list the servers", err)
		}
		items := make([]serverItem, len(resp.Servers))
		for i, s := range resp.Servers {
			items[i] = serverItem{
				Name: s.Name, Present: s.Present, Self: s.Name == resp.Name, Address: s.Address, PeerAddress: s.PeerAddress,
				Version: s.Version, Revision: s.Revision, Since: timestamp(s.Since), Leads: s.Leads,
			}
			if s.Role != hallmarkv1.ClusterServer_ROLE_UNSPECIFIED {
				items[i].Role = strings.ToLower(strings.TrimPrefix(s.Role.String(), "ROLE_"))
			}
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"SERVER", "STATE", "ROLE", "REVISION", "VERSION", "ADDRESS", "PEER ADDRESS"}}
			for _, s := range items {
				state := painted(a.style.green, "present")
				switch {
				case s.Name == "":
					state = painted(a.style.yellow, "not started")
				case !s.Present:
					state = painted(a.style.red, "away")
				}
				revision := ""
				if s.Present {
					revision = fmt.Sprint(s.Revision)
				}
				t.add(painted(a.style.bold, s.Name), state, text(s.Role), text(revision), text(s.Version), text(s.Address), text(s.PeerAddress))
			}
			io.WriteString(w, t.String())
		})
	}
	return cmd
}

// invitationItem is an invitation as commands print it.
type invitationItem struct {
	Join        string     `json:"join"` // the whole string that a new server needs
	TrustDomain string     `json:"trust_domain"`
	Server      string     `json:"server"`
	ExpiresAt   *time.Time `json:"expires_at"`
}

func (a *app) clusterInvite() *cobra.Command {
	ttl := duration{config.Duration(defaultTokenTTL)}
	var address string
	cmd := &cobra.Command{
		Use:   "invite",
		Short: "make the one string that a new server needs",
		Long: "Invite prints one string that carries this server's address, the fingerprints of its\n" +
			"authorities and a secret: all that a new server needs to join the cluster. It works\n" +
			"once. Who has it can make himself a server of the trust domain: keep it secret.",
		Example: "  hallmark cluster invite\n  hallmark cluster invite --ttl 1h --address ca-1.internal:8081",
		Args:    noArguments,
	}
	cmd.Flags().Var(&ttl, "ttl", "how `long` the invitation may be used")
	cmd.Flags().StringVar(&address, "address", "", "`HOST:PORT` by which the new server reaches this one (default what this one advertises)")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		seconds, err := ttl.seconds("--ttl")
		if err != nil {
			return err
		}
		if seconds == 0 {
			return usageError(errors.New("--ttl must be at least 1s"))
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		s, err := c.joinString(ctx, address)
		if err != nil {
			return err
		}
		invitation, err := c.cluster().Invite(ctx, &hallmarkv1.InviteRequest{Ttl: seconds})
		if err != nil {
			return rpcError("invite a server", err)
		}
		s.Token = invitation.Secret
		encoded, err := encodeJoin(s)
		if err != nil {
			return err
		}
		item := invitationItem{Join: encoded, TrustDomain: s.TrustDomain.Name(), Server: s.Server, ExpiresAt: timestamp(invitation.ExpiresAt)}
		return a.print(item, func(w io.Writer) {
			fmt.Fprintln(w, item.Join)
			a.remark("\nIt lets one server in at %s, until %s. On the new one:\n\n  hallmark server run -c FILE --join STRING",
				item.Server, a.moment(*item.ExpiresAt))
		})
	}
	return cmd
}

func (a *app) clusterLeave() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "take this server out of the cluster",
		Long: "Leave takes the server that is asked out of the cluster; it ends. What its authorities\n" +
			"signed stays valid until it expires. To join again it needs a new invitation and an\n" +
			"empty directory of its member.",
		Example: "  hallmark cluster leave --yes",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return a.removeServer(cmd, *socket, "", *yes) }
	return cmd
}

func (a *app) clusterRemove() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove SERVER",
		Short: "take a server that is gone for good out of the cluster",
		Long: "Remove takes a server out of the cluster, so that it no longer counts for the majority.\n" +
			"A member that never started has no name; its peer address stands for it.",
		Example: "  hallmark cluster remove server-b",
		Args:    arguments(1, 1, "the name of a server"),
	}
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.removeServer(cmd, *socket, args[0], *yes) }
	return cmd
}

// removedServer is what `cluster leave` and `cluster remove` print.
type removedServer struct {
	Removed string `json:"removed"`
}

// removeServer removes a server from the cluster; without a name, the one that
// is asked.
func (a *app) removeServer(cmd *cobra.Command, socket, name string, yes bool) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	c, err := a.admin(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if name == "" {
		resp, err := c.cluster().ListServers(ctx, &hallmarkv1.ListServersRequest{})
		if err != nil {
			return rpcError("ask for the server's name", err)
		}
		name = resp.Name
	}
	if err := a.confirm(yes, true, fmt.Sprintf("This takes %s out of the cluster, for good.", name)); err != nil {
		return err
	}
	if _, err := c.cluster().RemoveServer(ctx, &hallmarkv1.RemoveServerRequest{Name: name}); err != nil {
		return rpcError("remove the server", err)
	}
	return a.print(removedServer{name}, func(w io.Writer) {
		fmt.Fprintf(w, "%s is no longer a server of the cluster\n", printable(name))
	})
}
