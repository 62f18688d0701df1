package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/invite"
)

// inviteItem is an invitation as commands print it.
type inviteItem struct {
	Invitation       string `json:"invitation"`
	TrustDomain      string `json:"trust_domain"`
	EndpointURL      string `json:"bundle_endpoint_url"`
	Profile          string `json:"bundle_endpoint_profile"` // https_web or https_spiffe
	EndpointSPIFFEID string `json:"endpoint_spiffe_id,omitempty"`
	Fingerprint      string `json:"fingerprint"`
}

func inviteItemOf(i *invite.Invitation, text string) inviteItem {
	item := inviteItem{Invitation: text, TrustDomain: i.TrustDomain.Name(), EndpointURL: i.EndpointURL, Profile: "https_web", Fingerprint: i.Fingerprint()}
	if !i.EndpointID.IsZero() {
		item.Profile, item.EndpointSPIFFEID = "https_spiffe", i.EndpointID.String()
	}
	return item
}

func (a *app) federationInvite() *cobra.Command {
	var endpoint string
	var web bool
	cmd := &cobra.Command{
		Use:   "invite",
		Short: "make one string by which another trust domain federates with this one",
		Long: "Invite prints a string that says where this trust domain's bundle is published, and\n" +
			"what verifies that. It is no secret, but must not be changed on its way: its\n" +
			"fingerprint is for the people on both sides to compare.\n\n" +
			"Federation goes one way: for the other, accept an invitation of theirs.",
		Example: "  hallmark federation invite --url https://hallmark.example.org:8443/\n" +
			"  hallmark federation invite --url https://example.org:8443/ --web -o json",
		Args: arguments(0, 0, ""),
	}
	cmd.Flags().StringVar(&endpoint, "url", "", "`URL` by which others reach this server's bundle_endpoint, https")
	cmd.Flags().BoolVar(&web, "web", false, "bundle_endpoint has a certificate of the Web PKI (profile https_web)")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "url"); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		own, err := c.bundles().GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{X509Authorities: true}})
		if err != nil {
			return rpcError("get the bundle", err)
		}
		i, err := invitationOf(own, endpoint, web)
		if err != nil {
			return err
		}
		text, err := i.Encode()
		if err != nil {
			return usageError(err)
		}
		return a.print(inviteItemOf(i, text), func(w io.Writer) {
			fmt.Fprintln(w, text)
			a.remark("\nFingerprint: %s\n\nWhoever administers the other trust domain runs\n\n  hallmark federation accept STRING\n\n"+
				"and compares the fingerprint with you.", i.Fingerprint())
			if u, err := url.Parse(endpoint); err == nil && onlyHere(u.Host) {
				a.remark("\n%s is reached from this machine only.", endpoint)
			}
		})
	}
	return cmd
}

// invitationOf makes the invitation of a trust domain with a bundle.
func invitationOf(own *types.Bundle, endpoint string, web bool) (*invite.Invitation, error) {
	td, err := spiffeid.TrustDomainFromString(own.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("the server's trust domain: %w", err)
	}
	i := &invite.Invitation{TrustDomain: td, EndpointURL: endpoint}
	if web {
		return i, nil
	}
	if i.EndpointID, err = spiffeid.FromPath(td, "/spire/server"); err != nil {
		return nil, err
	}
	for _, authority := range own.X509Authorities {
		cert, err := x509.ParseCertificate(authority.Asn1)
		if err != nil {
			return nil, fmt.Errorf("an authority of the server: %w", err)
		}
		if !authority.Tainted {
			i.Roots = append(i.Roots, cert)
		}
	}
	return i, nil
}

func (a *app) federationAccept() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "accept STRING",
		Short: "federate with the trust domain that an invitation is of",
		Long: "Accept shows what an invitation says, has you confirm it, and federates with that\n" +
			"trust domain: its bundle is fetched at once and from then on. Compare the fingerprint\n" +
			"with whoever made the invitation. Where nobody can be asked, it needs --yes.",
		Example: "  hallmark federation accept hallmark-federation-v1.bWy4c2…\n  hallmark federation accept --yes \"$INVITATION\" -o json",
		Args:    arguments(1, 1, "an invitation"),
	}
	yes := yesFlag(cmd)
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		i, err := invite.Parse(args[0])
		if err != nil {
			return usageError(err)
		}
		item := inviteItemOf(i, args[0])
		d := details{style: a.style}
		d.addPainted("Trust domain", a.style.bold, item.TrustDomain)
		d.add("Endpoint", item.EndpointURL)
		d.add("Profile", item.Profile)
		d.add("Fingerprint", item.Fingerprint)
		what := d.String() + fmt.Sprintf("\nEntries that federate with %s will trust what it issues.", item.TrustDomain)
		if err := a.confirm(*yes, true, what); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{
			FederationRelationships: []*types.FederationRelationship{relationshipOf(i)},
		})
		if err != nil {
			return rpcError("accept the invitation of "+item.TrustDomain, err)
		}
		if len(resp.Results) != 1 {
			return errors.New("the server did not answer what it was asked")
		}
		if st := resp.Results[0].Status; st.GetCode() != int32(codes.OK) {
			return itemError("accept the invitation of "+item.TrustDomain, st.GetCode(), st.GetMessage())
		}
		if _, err := c.federations().RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: item.TrustDomain}); err != nil {
			a.remark("The bundle is not there yet; the server goes on trying: %s\n", printable(status.Convert(err).Message()))
		}
		f, err := c.federations().GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: item.TrustDomain})
		if err != nil {
			return rpcError("look at the federation with "+item.TrustDomain, err)
		}
		accepted := federationOf(f)
		if err := c.fetches(ctx, accepted); err != nil {
			return err
		}
		return a.printFederation(accepted)
	}
	return cmd
}

// relationshipOf returns what an invitation says, as the contracts have it.
func relationshipOf(i *invite.Invitation) *types.FederationRelationship {
	f := &types.FederationRelationship{
		TrustDomain: i.TrustDomain.Name(), BundleEndpointUrl: i.EndpointURL,
		BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}},
	}
	if !i.EndpointID.IsZero() {
		f.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: i.EndpointID.String()}}
	}
	if len(i.Roots) > 0 {
		f.TrustDomainBundle = &types.Bundle{TrustDomain: i.TrustDomain.Name()}
		for _, root := range i.Roots {
			f.TrustDomainBundle.X509Authorities = append(f.TrustDomainBundle.X509Authorities, &types.X509Certificate{Asn1: root.Raw})
		}
	}
	return f
}
