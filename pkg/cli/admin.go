package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/term"
	"google.golang.org/grpc"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// admin is a connection to a server's admin socket.
type admin struct {
	*grpc.ClientConn
	trustDomain spiffeid.TrustDomain // zero until asked for
}

func (a *app) admin(ctx context.Context, socket string) (*admin, error) {
	conn, err := serverSocket.connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	return &admin{ClientConn: conn}, nil
}

func (c *admin) server() hallmarkv1.AdminServiceClient { return hallmarkv1.NewAdminServiceClient(c) }
func (c *admin) entries() entryv1.EntryClient          { return entryv1.NewEntryClient(c) }
func (c *admin) agents() agentv1.AgentClient           { return agentv1.NewAgentClient(c) }
func (c *admin) bundles() bundlev1.BundleClient        { return bundlev1.NewBundleClient(c) }
func (c *admin) svids() svidv1.SVIDClient              { return svidv1.NewSVIDClient(c) }

// domain returns the server's trust domain.
func (c *admin) domain(ctx context.Context) (spiffeid.TrustDomain, error) {
	if !c.trustDomain.IsZero() {
		return c.trustDomain, nil
	}
	resp, err := c.server().GetServer(ctx, &hallmarkv1.GetServerRequest{})
	if err != nil {
		return spiffeid.TrustDomain{}, rpcError("ask the server for its trust domain", err)
	}
	td, err := spiffeid.TrustDomainFromString(resp.TrustDomain)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("the server's trust domain: %w", err)
	}
	c.trustDomain = td
	return td, nil
}

// id reads a SPIFFE ID; one that is only a path is completed with the server's
// trust domain.
func (c *admin) id(ctx context.Context, flag, text string) (*types.SPIFFEID, error) {
	var id spiffeid.ID
	var err error
	if strings.HasPrefix(text, "/") {
		var td spiffeid.TrustDomain
		if td, err = c.domain(ctx); err != nil {
			return nil, err
		}
		id, err = spiffeid.FromPath(td, text)
	} else {
		id, err = spiffeid.FromString(text)
	}
	if err != nil {
		return nil, usageError(fmt.Errorf("%s %q is no SPIFFE ID: %w; write spiffe://DOMAIN/PATH, or /PATH for one of this trust domain", flag, text, err))
	}
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, nil
}

// agentPath is where the IDs of agents begin.
const agentPath = "/spire/agent/"

// node reads an agent's ID; what follows /spire/agent/ is enough.
func (c *admin) node(ctx context.Context, text string) (*types.SPIFFEID, error) {
	if !strings.HasPrefix(text, "spiffe:") && !strings.HasPrefix(text, "/") {
		text = agentPath + text
	}
	id, err := c.id(ctx, "agent", text)
	if err == nil && !strings.HasPrefix(id.Path, agentPath) {
		return nil, usageError(fmt.Errorf("%q is not an agent's ID: those begin with %s; \"hallmark node list\" shows them", idText(id), agentPath))
	}
	return id, err
}

// idText writes a SPIFFE ID of the contracts.
func idText(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.TrustDomain + id.Path
}

// confirm asks whether to do what cannot simply be undone. Without a terminal
// to ask at, an irreversible thing needs --yes, any other is done.
func (a *app) confirm(yes, irreversible bool, what string) error {
	if yes {
		return nil
	}
	f, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		if irreversible {
			return usageError(fmt.Errorf("%s Nobody is there to confirm that; pass --yes to do it", what))
		}
		return nil
	}
	fmt.Fprintf(a.err, "%s\nContinue? [y/N] ", what)
	answer, err := bufio.NewReader(f).ReadString('\n')
	if err != nil && answer == "" {
		return errors.New("nothing was done")
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was done")
}

func yesFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().BoolP("yes", "y", false, "do not ask")
}
