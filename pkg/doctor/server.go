package doctor

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// server asks the server how it is.
func (d *examination) server(ctx context.Context, p *part) {
	cred, ok := p.socket(ctx, "server", d.Server.Socket, adminMode)
	if !ok {
		return
	}
	p.descriptors(d.Server, cred)
	conn, err := dialSocket(d.Server.Socket)
	if err != nil {
		p.fail("status", "", "%v", err)
		return
	}
	defer conn.Close()
	c := &serverClient{d, conn, hallmarkv1.NewAdminServiceClient(conn)}
	info, ok := c.status(ctx, p)
	if !ok {
		return
	}
	p.further(ctx,
		func(ctx context.Context, p *part) { c.listener(ctx, p, info) },
		c.authorities, c.agents, c.federation, c.publishing)
}

// serverClient asks a server over its admin socket.
type serverClient struct {
	*examination
	conn  *grpc.ClientConn
	admin hallmarkv1.AdminServiceClient
}

func (c *serverClient) status(ctx context.Context, p *part) (*hallmarkv1.GetServerResponse, bool) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	info, err := c.admin.GetServer(ctx, &hallmarkv1.GetServerRequest{})
	if err != nil {
		p.fail("status", "See the server's log.", "the server does not say how it is: %s", words(err))
		return nil, false
	}
	health, err := grpc_health_v1.NewHealthClient(c.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	switch {
	case info.KeysProblem != "":
		p.fail("keys", "Mend the key manager that keys.kms.uri names; the server uses it again by itself.", "nothing is signed: %s", info.KeysProblem)
	case err != nil:
		p.fail("status", "See the server's log.", "the server does not say whether it serves: %s", words(err))
	case health.Status != grpc_health_v1.HealthCheckResponse_SERVING:
		p.fail("status", "See the server's log: it has no authority to sign with, or is stopping.", "the server does not serve")
	default:
		p.ok("status", "serves %s at revision %d", info.TrustDomain, info.Revision)
	}
	p.version("server", info.Version)
	return info, true
}

// listener dials the server's own TCP listener, and looks at what join strings
// say of it.
func (c *serverClient) listener(ctx context.Context, p *part, info *hallmarkv1.GetServerResponse) {
	calling, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	own, err := bundlev1.NewBundleClient(c.conn).GetBundle(calling, &bundlev1.GetBundleRequest{})
	if err != nil {
		p.fail("bundle", "See the server's log.", "the trust domain has no bundle: %s", words(err))
		return
	}
	td, err := spiffeid.TrustDomainFromString(info.TrustDomain)
	if err != nil {
		p.fail("bundle", "", "the server's trust domain: %v", err)
		return
	}
	if _, err := c.admin.GetJoinInfo(calling, &hallmarkv1.GetJoinInfoRequest{}); err != nil {
		p.warn("advertise", "Until then no join string can be made.", "%s", words(err))
	}
	var ders [][]byte
	for _, a := range own.X509Authorities {
		ders = append(ders, a.Asn1)
	}
	c.dial(ctx, p, peer{
		address: local(info.Address), trustDomain: td, authorities: parse(ders), trustedBy: "the trust domain's own bundle",
		remedy: "Another program may listen at that address; see the server's log.",
	})
}

// local is how a listener's address is dialed on its own machine.
func local(address string) string {
	host, port, err := net.SplitHostPort(address)
	if ip, bad := netip.ParseAddr(host); err == nil && bad == nil && ip.IsUnspecified() {
		return net.JoinHostPort("localhost", port)
	}
	return address
}

// authorities looks whether there is a key that signs, and whether the next one
// comes in time.
func (c *serverClient) authorities(ctx context.Context, p *part) {
	const check = "authorities"
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.admin.ListAuthorities(ctx, &hallmarkv1.ListAuthoritiesRequest{})
	if err != nil {
		p.fail(check, "See the server's log.", "they cannot be listed: %s", words(err))
		return
	}
	type signer struct {
		server string
		kind   hallmarkv1.Authority_Kind
	}
	signers := make(map[signer][]*hallmarkv1.Authority)
	for _, a := range resp.Authorities {
		key := signer{a.Server, a.Kind}
		signers[key] = append(signers[key], a)
		if a.Tainted {
			p.warn(check, fmt.Sprintf("Once everyone has replaced what it signed (\"hallmark authority list\" counts the agents): \"hallmark authority revoke %s %s\".", kindName(a.Kind), a.Id),
				"the %s authority %s is tainted and still in the bundle", kindName(a.Kind), a.Id)
		}
	}
	if len(signers) == 0 {
		p.fail(check, "See the server's log.", "there are none")
	}
	order := func(a, b signer) int { return cmp.Or(cmp.Compare(a.server, b.server), cmp.Compare(a.kind, b.kind)) }
	for _, key := range slices.SortedFunc(maps.Keys(signers), order) {
		c.signer(p, kindName(key.kind), key.server, signers[key])
	}
}

func kindName(k hallmarkv1.Authority_Kind) string {
	return strings.ToLower(strings.TrimPrefix(k.String(), "KIND_"))
}

// What is late: a server prepares the next authority at half of the active
// one's life, but a month before its end at most, and lets it sign a sixth of
// that life before the end, but a week at most.
const (
	preparedAhead  = 30 * 24 * time.Hour
	activatedAhead = 7 * 24 * time.Hour
)

// signer looks at the authorities of one kind on one server.
func (c *serverClient) signer(p *part, kind, server string, all []*hallmarkv1.Authority) {
	const check = "authorities"
	var active, prepared *hallmarkv1.Authority
	for _, a := range all {
		switch a.State {
		case hallmarkv1.Authority_STATE_ACTIVE:
			active = a
		case hallmarkv1.Authority_STATE_PREPARED:
			prepared = a
		}
	}
	rotate := fmt.Sprintf("See the server's log for why; \"hallmark authority rotate %s\" does it now.", kind)
	if active == nil {
		p.fail(check, rotate, "server %s has no active %s authority", server, kind)
		return
	}
	end := time.Unix(active.ExpiresAt, 0)
	life := end.Sub(time.Unix(active.CreatedAt, 0))
	left := end.Sub(c.Now())
	switch {
	case left <= 0:
		p.fail(check, rotate, "the active %s authority of server %s %s", kind, server, c.until(end))
	case left < min(life/6, activatedAhead)/2:
		p.warn(check, rotate, "the active %s authority of server %s %s, and another should sign already", kind, server, c.until(end))
	case prepared == nil && left < min(life/2, preparedAhead)*9/10:
		p.warn(check, rotate, "the active %s authority of server %s %s, and the next one should be prepared already", kind, server, c.until(end))
	default:
		p.ok(check, "%s of server %s %s, and is replaced before", kind, server, c.until(end))
	}
}

const (
	agentPage  = 1000 // agents asked for at once
	agentPages = 20   // asked for at most: they are a sample of a very large domain
	// soon is when an agent that is away should be looked for.
	soon = 10 * time.Minute
	// settle is how long an agent may take to acknowledge what it was sent.
	settle = time.Second
)

// agents looks for those that lose their identity, or have lost it.
func (c *serverClient) agents(ctx context.Context, p *part) {
	const check = "agents"
	list, all, err := c.listAgents(ctx)
	if err != nil {
		p.fail(check, "See the server's log.", "they cannot be listed: %s", words(err))
		return
	}
	connections, err := c.connections(ctx)
	if err != nil {
		p.fail(check, "See the server's log.", "their connections cannot be listed: %s", words(err))
		return
	}
	var banned, expired, lost, expiring []string
	for _, a := range list {
		id := "spiffe://" + a.Id.GetTrustDomain() + a.Id.GetPath()
		left := time.Unix(a.X509SvidExpiresAt, 0).Sub(c.Now())
		switch {
		case a.Banned:
			banned = append(banned, id)
		case left <= 0 && !a.CanReattest:
			lost = append(lost, id)
		case left <= 0:
			expired = append(expired, id)
		case left < soon && connections[id] == nil:
			expiring = append(expiring, id)
		}
	}
	before := len(p.findings)
	warn := func(ids []string, what, remedy string) {
		if len(ids) > 0 {
			p.warn(check, remedy, "%s %s", some(ids), what)
		}
	}
	warn(lost, "had an SVID that ended, and joined by a token: they cannot come back by themselves", "Start them with a new join string (\"hallmark token generate\"), or \"hallmark node purge\" forgets those that are gone.")
	warn(expired, "had an SVID that ended", "Start them again, or \"hallmark node purge\" forgets those that are gone.")
	warn(expiring, "hold no stream to this server, and their SVID ends within "+span(soon), "See whether they run, and what \"hallmark doctor\" says there.")
	warn(banned, "may not come back: banned", "\"hallmark node evict\" lifts a ban.")
	warn(c.behind(ctx, connections), "did not acknowledge what was sent", "Their nodes may be overloaded; see what \"hallmark doctor\" says there.")
	switch {
	case len(p.findings) > before:
	case !all:
		p.ok(check, "of the first %d, %d are connected", len(list), len(connections))
	default:
		p.ok(check, "%d, %d of them connected", len(list), len(connections))
	}
}

// some names a few of many.
func some(ids []string) string {
	const most = 3
	slices.Sort(ids)
	if len(ids) > most {
		return fmt.Sprintf("%s and %d others", strings.Join(ids[:most], ", "), len(ids)-most)
	}
	return strings.Join(ids, ", ")
}

// listAgents returns the agents, and whether these are all.
func (c *serverClient) listAgents(ctx context.Context) (out []*types.Agent, all bool, err error) {
	req := &agentv1.ListAgentsRequest{PageSize: agentPage, OutputMask: &types.AgentMask{X509SvidExpiresAt: true, Banned: true, CanReattest: true}}
	for range agentPages {
		calling, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := agentv1.NewAgentClient(c.conn).ListAgents(calling, req)
		cancel()
		if err != nil {
			return nil, false, err
		}
		out = append(out, resp.Agents...)
		if req.PageToken = resp.NextPageToken; req.PageToken == "" {
			return out, true, nil
		}
	}
	return out, false, nil
}

// connections returns the agents that hold a stream, by ID.
func (c *serverClient) connections(ctx context.Context) (map[string]*hallmarkv1.Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.admin.ListConnections(ctx, &hallmarkv1.ListConnectionsRequest{})
	if err != nil {
		return nil, err
	}
	out := make(map[string]*hallmarkv1.Connection, len(resp.Connections))
	for _, conn := range resp.Connections {
		out[conn.AgentId] = conn
	}
	return out, nil
}

// behind returns those of the agents that do not acknowledge what they were
// sent, even after a moment.
func (c *serverClient) behind(ctx context.Context, before map[string]*hallmarkv1.Connection) (ids []string) {
	suspects := false
	for _, conn := range before {
		suspects = suspects || conn.Behind
	}
	if !suspects {
		return nil
	}
	timer := time.NewTimer(settle)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil
	}
	after, err := c.connections(ctx)
	if err != nil {
		return nil
	}
	for id, now := range after {
		was := before[id]
		if now.Behind && was.GetBehind() && was.AcknowledgedRevision == now.AcknowledgedRevision && was.ConnectedAt == now.ConnectedAt {
			ids = append(ids, id)
		}
	}
	return ids
}

// publishing looks whether the targets have what is published. Of a server that has
// none, or that cannot say, there is nothing to say.
func (c *serverClient) publishing(ctx context.Context, p *part) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.admin.ListPublishTargets(ctx, &hallmarkv1.ListPublishTargetsRequest{})
	if err != nil {
		return
	}
	for _, t := range resp.Targets {
		if t.Error != "" {
			p.warn("publish", "Until it is mended, who reads the target knows nothing of later keys; the server tries again by itself.", "the target %s does not get what is to be published: %s", t.Name, t.Error)
			continue
		}
		p.ok("publish", "the target %s has sequence %d", t.Name, t.SequenceNumber)
	}
}

const (
	federationPage  = 100 // relationships or bundles asked for at once
	federationPages = 10  // at most
	// stale is how long before the end of a foreign bundle's last authority
	// someone should look.
	stale = time.Hour
)

// federation looks whether the bundles of foreign trust domains are of use.
func (c *serverClient) federation(ctx context.Context, p *part) {
	const check = "federation"
	bundles, err := c.bundles(ctx)
	if err != nil {
		p.fail(check, "See the server's log.", "the bundles cannot be listed: %s", words(err))
		return
	}
	req := &trustdomainv1.ListFederationRelationshipsRequest{PageSize: federationPage}
	fetched := make(map[string]bool) // trust domains whose bundle can be fetched
	for range federationPages {
		calling, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := trustdomainv1.NewTrustDomainClient(c.conn).ListFederationRelationships(calling, req)
		cancel()
		if err != nil {
			p.fail(check, "See the server's log.", "the relationships cannot be listed: %s", words(err))
			return
		}
		for _, f := range resp.FederationRelationships {
			fetched[f.TrustDomain] = true
			if bundles[f.TrustDomain] == nil {
				p.fail(check, fmt.Sprintf("\"hallmark federation refresh %s\" fetches it and says what is wrong.", f.TrustDomain), "there is no bundle of %s yet: its identities do not verify", f.TrustDomain)
			}
		}
		if req.PageToken = resp.NextPageToken; req.PageToken == "" {
			break
		}
	}
	for _, name := range slices.Sorted(maps.Keys(bundles)) {
		remedy := fmt.Sprintf("Get it anew and store it: \"hallmark bundle set %s\".", name)
		if fetched[name] {
			remedy = fmt.Sprintf("\"hallmark federation refresh %s\" fetches it and says what is wrong.", name)
		}
		var last time.Time // when the last of its authorities ends
		for _, a := range bundles[name].X509Authorities {
			if cert, err := x509.ParseCertificate(a.Asn1); err == nil && cert.NotAfter.After(last) {
				last = cert.NotAfter
			}
		}
		switch left := last.Sub(c.Now()); {
		case last.IsZero(): // of JWT authorities alone
			p.ok(check, "there is a bundle of %s", name)
		case left <= 0:
			p.fail(check, remedy, "the bundle of %s is stale: its last X.509 authority %s", name, c.until(last))
		case left < stale:
			p.warn(check, remedy, "the bundle of %s is getting stale: its last X.509 authority %s", name, c.until(last))
		default:
			p.ok(check, "the bundle of %s is good: its last X.509 authority %s", name, c.until(last))
		}
	}
}

// bundles returns those of foreign trust domains, by name.
func (c *serverClient) bundles(ctx context.Context) (map[string]*types.Bundle, error) {
	out := make(map[string]*types.Bundle)
	req := &bundlev1.ListFederatedBundlesRequest{PageSize: federationPage}
	for range federationPages {
		calling, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := bundlev1.NewBundleClient(c.conn).ListFederatedBundles(calling, req)
		cancel()
		if err != nil {
			return nil, err
		}
		for _, b := range resp.Bundles {
			out[b.TrustDomain] = b
		}
		if req.PageToken = resp.NextPageToken; req.PageToken == "" {
			break
		}
	}
	return out, nil
}
