package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/join"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// defaultTokenTTL is long enough to carry a string to another machine, and
// short enough that a forgotten one is worth nothing.
const defaultTokenTTL = 10 * time.Minute

func (a *app) tokenCommand() *cobra.Command {
	return noun("token", "admit new nodes",
		"A join token admits one agent, once, for a short time.",
		"  hallmark token generate",
		a.tokenGenerate())
}

// tokenItem is a join token as commands print it.
type tokenItem struct {
	Join        string     `json:"join"` // the whole string that an agent needs
	Token       string     `json:"token"`
	TrustDomain string     `json:"trust_domain"`
	Server      string     `json:"server"`
	AgentID     string     `json:"agent_id,omitempty"` // the node alias made with it
	ExpiresAt   *time.Time `json:"expires_at"`
}

func (a *app) tokenGenerate() *cobra.Command {
	ttl := duration{config.Duration(defaultTokenTTL)}
	var agentID, address string
	var raw bool
	cmd := &cobra.Command{
		Use:   "generate",
		Short: "make the one string that a new agent needs",
		Long: "Generate makes a join token and prints one string that carries it, the server's\n" +
			"address and the fingerprints of its authorities: all that an agent needs to trust\n" +
			"the server and be admitted by it. The string works once; keep it secret until then.",
		Example: "  hallmark token generate\n" +
			"  hallmark token generate --ttl 1h --agent-id /nodes/web-1\n" +
			"  ssh node hallmark agent run --join \"$(hallmark token generate --address ca.internal:8081)\"",
		Args: noArguments,
	}
	cmd.Flags().Var(&ttl, "ttl", "how `long` the token may be used")
	cmd.Flags().StringVar(&agentID, "agent-id", "", "a name for the node, as a parent of entries: `SPIFFE-ID` or /PATH")
	cmd.Flags().StringVar(&address, "address", "", "`HOST:PORT` by which the agent reaches the server (default what the server advertises)")
	cmd.Flags().BoolVar(&raw, "raw", false, "print the bare token, for agents that are configured with the rest")
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
		seconds, err := ttl.seconds("--ttl")
		if err != nil {
			return err
		}
		if seconds == 0 {
			return usageError(errors.New("--ttl must be at least 1s"))
		}
		var alias *types.SPIFFEID
		if agentID != "" {
			if alias, err = c.id(ctx, "--agent-id", agentID); err != nil {
				return err
			}
		}
		item, err := generateToken(ctx, c, seconds, alias, address)
		if err != nil {
			return err
		}
		return a.print(item, func(w io.Writer) {
			if raw {
				fmt.Fprintln(w, item.Token)
				return
			}
			fmt.Fprintln(w, item.Join)
			a.remark("\nIt admits one agent at %s, until %s. On the new node:\n\n  hallmark agent run --join STRING",
				item.Server, a.moment(*item.ExpiresAt))
			if onlyHere(item.Server) {
				a.remark("\n%s reaches the server from this machine only; --address names another.", item.Server)
			}
		})
	}
	return cmd
}

// onlyHere reports whether an address is that of the machine for itself.
func onlyHere(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

// joinString returns what a join string says of the server, without a token.
func (c *admin) joinString(ctx context.Context, address string) (join.String, error) {
	info, err := c.server().GetJoinInfo(ctx, &hallmarkv1.GetJoinInfoRequest{})
	if err != nil {
		return join.String{}, rpcError("ask the server how it is reached", err)
	}
	td, err := spiffeid.TrustDomainFromString(info.TrustDomain)
	if err != nil {
		return join.String{}, fmt.Errorf("the server's trust domain: %w", err)
	}
	s := join.String{TrustDomain: td, Server: info.Address}
	if address != "" {
		s.Server = address
	}
	for _, hash := range info.RootHashes {
		if len(hash) != len(join.Root{}) {
			return join.String{}, fmt.Errorf("the server gave a root hash of %d bytes; it must have %d", len(hash), len(join.Root{}))
		}
		s.Roots = append(s.Roots, join.Root(hash))
	}
	return s, nil
}

func encodeJoin(s join.String) (string, error) {
	encoded, err := s.Encode()
	if err != nil {
		return "", &failure{code: exitFailed, err: err,
			remedy: "--address names the host and port by which the server is reached; \"advertise\" in its configuration sets it for all."}
	}
	return encoded, nil
}

// generateToken makes a join token and its join string.
func generateToken(ctx context.Context, c *admin, ttl int32, alias *types.SPIFFEID, address string) (*tokenItem, error) {
	s, err := c.joinString(ctx, address)
	if err != nil {
		return nil, err
	}
	token, err := c.agents().CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: ttl, AgentId: alias})
	if err != nil {
		return nil, rpcError("create a join token", err)
	}
	s.Token = token.Value
	encoded, err := encodeJoin(s)
	if err != nil {
		return nil, err
	}
	return &tokenItem{
		Join: encoded, Token: token.Value, TrustDomain: s.TrustDomain.Name(), Server: s.Server,
		AgentID: idText(alias), ExpiresAt: timestamp(token.ExpiresAt),
	}, nil
}
