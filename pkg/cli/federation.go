package cli

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	bundlePage    = 100     // bundles or relationships asked for at once
	maxBundleFile = 1 << 20 // bytes
)

func (c *admin) federations() trustdomainv1.TrustDomainClient {
	return trustdomainv1.NewTrustDomainClient(c)
}

func (a *app) federationCommand() *cobra.Command {
	return noun("federation", "say where foreign trust domains publish their bundles",
		"A federation relationship says where the bundle of a foreign trust domain is\n"+
			"published, and how that endpoint proves itself: by a certificate of the Web PKI, or\n"+
			"by an X509-SVID with --endpoint-spiffe-id.",
		"  hallmark federation invite --url https://example.org:8443/    # for the other side to accept\n  hallmark federation list\n  hallmark federation create other.org --url https://other.org/bundle\n  hallmark federation refresh other.org",
		a.federationInvite(), a.federationAccept(), a.federationPut("create"), a.federationPut("update"), a.federationDelete(), a.federationList(), a.federationShow(), a.federationRefresh())
}

// federationItem is a relationship as commands print it.
type federationItem struct {
	TrustDomain      string `json:"trust_domain"`
	EndpointURL      string `json:"bundle_endpoint_url"`
	Profile          string `json:"bundle_endpoint_profile"` // https_web or https_spiffe
	EndpointSPIFFEID string `json:"endpoint_spiffe_id,omitempty"`
	SequenceNumber   uint64 `json:"bundle_sequence_number,omitempty"`
	HasBundle        bool   `json:"has_bundle"`
	// Since the server that is asked started.
	FetchedAt *time.Time `json:"bundle_fetched_at,omitempty"`
	Failures  int        `json:"failed_fetches,omitempty"` // since then
	LastError string     `json:"last_error,omitempty"`
}

func federationOf(f *types.FederationRelationship) *federationItem {
	out := &federationItem{TrustDomain: f.TrustDomain, EndpointURL: f.BundleEndpointUrl, Profile: "https_web",
		HasBundle: f.TrustDomainBundle != nil, SequenceNumber: f.TrustDomainBundle.GetSequenceNumber()}
	if p := f.GetHttpsSpiffe(); p != nil {
		out.Profile, out.EndpointSPIFFEID = "https_spiffe", p.EndpointSpiffeId
	}
	return out
}

// fetches adds what has come of the server's fetches to relationships. Another
// server than Hallmark's does not say.
func (c *admin) fetches(ctx context.Context, items ...*federationItem) error {
	resp, err := c.server().ListBundleFetches(ctx, &hallmarkv1.ListBundleFetchesRequest{})
	if err != nil && status.Code(err) != codes.Unimplemented {
		return rpcError("list the fetches of bundles", err)
	}
	for _, f := range resp.GetFetches() {
		for _, item := range items {
			if item.TrustDomain == f.TrustDomain {
				item.FetchedAt, item.Failures, item.LastError = timestamp(f.FetchedAt), int(f.Failures), f.Error
			}
		}
	}
	return nil
}

// age says how old the bundle is that the server has.
func (a *app) age(f *federationItem) cell {
	switch {
	case f.Failures > 0 && f.FetchedAt != nil:
		return painted(a.style.red, fmt.Sprintf("%s; %s failed since", a.relative(*f.FetchedAt), count(f.Failures, "fetch", "fetches")))
	case f.Failures > 0:
		return painted(a.style.red, fmt.Sprintf("%s failed", count(f.Failures, "fetch", "fetches")))
	case f.FetchedAt != nil:
		return text(a.relative(*f.FetchedAt))
	case f.HasBundle:
		return text("not fetched yet")
	}
	return text("none yet")
}

func (a *app) printFederation(item *federationItem) error {
	return a.print(item, func(w io.Writer) {
		d := details{style: a.style}
		d.addPainted("Trust domain", a.style.bold, item.TrustDomain)
		d.add("Endpoint", item.EndpointURL)
		d.add("Profile", item.Profile)
		d.add("Endpoint ID", item.EndpointSPIFFEID)
		bundle := "none yet"
		if item.HasBundle {
			bundle = fmt.Sprintf("sequence %d", item.SequenceNumber)
		}
		d.add("Bundle", bundle)
		if item.FetchedAt != nil {
			d.add("Fetched", a.moment(*item.FetchedAt))
		}
		if item.Failures > 0 {
			d.addPainted("Failing", a.style.red, fmt.Sprintf("%s: %s", count(item.Failures, "fetch", "fetches"), item.LastError))
		}
		io.WriteString(w, d.String())
	})
}

func (a *app) federationPut(verb string) *cobra.Command {
	var url, id, file string
	var web bool
	cmd := &cobra.Command{
		Use: verb + " DOMAIN",
		Short: map[string]string{"create": "federate with a trust domain",
			"update": "change the fields that are given"}[verb],
		Long: map[string]string{
			"create": "Create says where the bundle of a trust domain is published. A bundle given with it\nis stored at once; the profile https_spiffe needs one to begin with.",
			"update": "Update changes what the given flags say of a relationship and leaves the rest.",
		}[verb],
		Example: "  hallmark federation " + verb + " other.org --url https://other.org/bundle --web\n" +
			"  hallmark federation " + verb + " other.org --url https://other.org:8443 --endpoint-spiffe-id spiffe://other.org/spire/server --bundle other.json",
		Args: arguments(1, 1, "a trust domain"),
	}
	cmd.Flags().StringVar(&url, "url", "", "`URL` of the bundle endpoint, https")
	cmd.Flags().BoolVar(&web, "web", false, "the endpoint has a certificate of the Web PKI (profile https_web, the default)")
	cmd.Flags().StringVar(&id, "endpoint-spiffe-id", "", "the SPIFFE `ID` that the endpoint proves (profile https_spiffe)")
	cmd.Flags().StringVar(&file, "bundle", "", "`FILE` with the bundle, PEM or SPIFFE; - is the standard input")
	exclusive(cmd, "web", "endpoint-spiffe-id")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		given := cmd.Flags().Changed
		if verb == "create" {
			if err := required(cmd, "url"); err != nil {
				return err
			}
		} else if !given("url") && !given("web") && !given("endpoint-spiffe-id") && !given("bundle") {
			return usageError(errors.New("nothing to change: give the flags of the fields that are new"))
		}
		f := &types.FederationRelationship{TrustDomain: args[0], BundleEndpointUrl: url,
			BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}}
		if given("endpoint-spiffe-id") {
			f.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: id}}
		}
		var err error
		if given("bundle") {
			if f.TrustDomainBundle, err = a.bundleFile(args[0], file); err != nil {
				return err
			}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		what := verb + " the federation with " + args[0]
		var st *types.Status
		if verb == "create" {
			resp, err := c.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{f}})
			if err != nil {
				return rpcError(what, err)
			}
			for _, r := range resp.Results {
				st, f = r.Status, r.FederationRelationship
			}
		} else {
			resp, err := c.federations().BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
				FederationRelationships: []*types.FederationRelationship{f},
				InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: given("url"),
					BundleEndpointProfile: given("web") || given("endpoint-spiffe-id"), TrustDomainBundle: given("bundle")},
			})
			if err != nil {
				return rpcError(what, err)
			}
			for _, r := range resp.Results {
				st, f = r.Status, r.FederationRelationship
			}
		}
		if st.GetCode() != int32(codes.OK) {
			return itemError(what, st.GetCode(), st.GetMessage())
		}
		return a.printFederation(federationOf(f))
	}
	return cmd
}

func (a *app) federationDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete DOMAIN...",
		Short:   "end federation relationships; the bundles stay",
		Long:    "Delete forgets where bundles are published. The bundles stay in use until they are\ndeleted with \"hallmark bundle delete\".",
		Example: "  hallmark federation delete other.org",
		Args:    arguments(1, -1, "a trust domain"),
	}
	socket := socketFlag(cmd, serverSocket)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.federations().BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: args})
		if err != nil {
			return rpcError("delete federation relationships", err)
		}
		var errs []error
		for _, r := range resp.Results {
			if r.GetStatus().GetCode() != int32(codes.OK) {
				errs = append(errs, itemError("delete the federation with "+r.TrustDomain, r.GetStatus().GetCode(), r.GetStatus().GetMessage()))
				continue
			}
			fmt.Fprintf(a.out, "deleted %s\n", printable(r.TrustDomain))
		}
		return joined(errs)
	}
	return cmd
}

func (a *app) federationList() *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "list federation relationships",
		Long:    "List prints the relationships, by trust domain, and how old the bundle is that the\nserver has of each.",
		Example: "  hallmark federation list\n  hallmark federation list -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.admin(cmd.Context(), *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		all, err := listFederations(cmd.Context(), c)
		if err != nil {
			return err
		}
		items := make([]*federationItem, len(all))
		for i, f := range all {
			items[i] = federationOf(f)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		if err := c.fetches(ctx, items...); err != nil {
			return err
		}
		if len(items) == 0 && a.output == outputTable {
			a.remark("No federation relationships.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"TRUST DOMAIN", "ENDPOINT", "PROFILE", "ENDPOINT ID", "BUNDLE"}}
			for _, f := range items {
				t.add(painted(a.style.bold, f.TrustDomain), text(f.EndpointURL), text(f.Profile), text(f.EndpointSPIFFEID), a.age(f))
			}
			io.WriteString(w, t.String())
		})
	}
	return cmd
}

func listFederations(ctx context.Context, c *admin) (out []*types.FederationRelationship, err error) {
	for token := ""; ; {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.federations().ListFederationRelationships(callCtx, &trustdomainv1.ListFederationRelationshipsRequest{PageSize: bundlePage, PageToken: token})
		cancel()
		if err != nil {
			return nil, rpcError("list federation relationships", err)
		}
		out = append(out, resp.FederationRelationships...)
		if token = resp.NextPageToken; token == "" {
			return out, nil
		}
	}
}

func listBundles(ctx context.Context, c *admin) (out []*types.Bundle, err error) {
	for token := ""; ; {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := c.bundles().ListFederatedBundles(callCtx, &bundlev1.ListFederatedBundlesRequest{PageSize: bundlePage, PageToken: token})
		cancel()
		if err != nil {
			return nil, rpcError("list bundles", err)
		}
		out = append(out, resp.Bundles...)
		if token = resp.NextPageToken; token == "" {
			return out, nil
		}
	}
}

func (a *app) federationShow() *cobra.Command {
	cmd := &cobra.Command{
		Use: "show DOMAIN", Short: "show a federation relationship",
		Long:    "Show prints the relationship with a trust domain, when its bundle was fetched, and\nwhy it was not since.",
		Example: "  hallmark federation show other.org",
		Args:    arguments(1, 1, "a trust domain"),
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
		f, err := c.federations().GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: args[0]})
		if err != nil {
			return rpcError("show the federation with "+args[0], err)
		}
		item := federationOf(f)
		if err := c.fetches(ctx, item); err != nil {
			return err
		}
		return a.printFederation(item)
	}
	return cmd
}

func (a *app) federationRefresh() *cobra.Command {
	cmd := &cobra.Command{
		Use: "refresh DOMAIN", Short: "fetch a trust domain's bundle from its endpoint now",
		Long:    "Refresh has the server fetch the bundle from the endpoint and store it.",
		Example: "  hallmark federation refresh other.org",
		Args:    arguments(1, 1, "a trust domain"),
	}
	socket := socketFlag(cmd, serverSocket)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.federations().RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: args[0]}); err != nil {
			return rpcError("refresh the bundle of "+args[0], err)
		}
		fmt.Fprintf(a.out, "refreshed %s\n", printable(args[0]))
		return nil
	}
	return cmd
}

// bundleFile reads a trust domain's bundle from a file, or with "-" from the
// standard input.
func (a *app) bundleFile(name, file string) (*types.Bundle, error) {
	src := a.in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read the bundle: %w", err)
		}
		defer f.Close()
		src = f
	}
	data, err := io.ReadAll(io.LimitReader(src, maxBundleFile+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the bundle: %w", err)
	case len(data) > maxBundleFile:
		return nil, fmt.Errorf("read the bundle: %s is longer than %d bytes", file, maxBundleFile)
	}
	return readBundle(name, data)
}

// readBundle reads a bundle: X.509 authorities in PEM, or a SPIFFE bundle
// document.
func readBundle(name string, data []byte) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return nil, usageError(fmt.Errorf("%q is no trust domain: %w", name, err))
	}
	out := &types.Bundle{TrustDomain: td.Name()}
	data = bytes.TrimSpace(data)
	if bytes.HasPrefix(data, []byte("{")) {
		b, err := spiffebundle.Parse(td, bundle.Usable(data))
		if err != nil {
			return nil, fmt.Errorf("the bundle of %s: %w", name, err)
		}
		for _, cert := range b.X509Authorities() {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: cert.Raw})
		}
		for kid, key := range b.JWTAuthorities() {
			der, err := x509.MarshalPKIXPublicKey(key)
			if err != nil {
				return nil, fmt.Errorf("the bundle of %s: JWT authority %q: %w", name, kid, err)
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: kid, PublicKey: der})
		}
		for kid, key := range b.WITAuthorities() {
			der, err := x509.MarshalPKIXPublicKey(key)
			if err != nil {
				return nil, fmt.Errorf("the bundle of %s: WIT authority %q: %w", name, kid, err)
			}
			out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{KeyId: kid, PublicKey: der})
		}
		out.SequenceNumber, _ = b.SequenceNumber()
		hint, _ := b.RefreshHint()
		out.RefreshHint = int64(hint.Seconds())
		return out, nil
	}
	for len(data) > 0 {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("the bundle of %s: neither certificates in PEM nor a SPIFFE bundle document", name)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("the bundle of %s: %w", name, err)
		}
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: block.Bytes})
		data = bytes.TrimSpace(rest)
	}
	if len(out.X509Authorities) == 0 {
		return nil, fmt.Errorf("the bundle of %s is empty", name)
	}
	return out, nil
}
