package cli

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// reasons are those for which an SVID is revoked for good, as RFC 5280 §5.3.1
// writes and numbers them.
var reasons = map[string]int32{
	"unspecified": 0, "keyCompromise": 1, "cACompromise": 2, "affiliationChanged": 3, "superseded": 4,
	"cessationOfOperation": 5, "privilegeWithdrawn": 9, "aACompromise": 10,
}

func reasonName(n int32) string {
	for name, number := range reasons {
		if number == n {
			return name
		}
	}
	return fmt.Sprint(n)
}

// revokeMargin is how much longer than the server waits for its answer.
const revokeMargin = 10 * time.Second

func (a *app) svidRevoke() *cobra.Command {
	var serial, authority, token, jti, id, node, reason string
	var wait duration
	cmd := &cobra.Command{
		Use:   "revoke [CERTIFICATE.pem...]",
		Short: "take SVIDs back before their end",
		Long: "Revoke puts X509-SVIDs on the CRL of the authority that signed them, on whichever server\n" +
			"that is, and JWT-SVIDs and WIT-SVIDs that have a status (status_list_endpoint) into their\n" +
			"status list, and waits until all have it: from then on peers that honour CRLs, and relying\n" +
			"parties that honour status lists, refuse them. Agents replace a revoked SVID of a workload\n" +
			"that is still entitled to one at once, with another key; delete the entry of one that is\n" +
			"not to have any. An agent whose SVID is revoked has to attest again.\n\n" +
			"What is revoked: the certificate of a PEM file; the token of a file, or that with a jti; a\n" +
			"serial number, of either; all that was issued of an identity until now; or an agent's SVID\n" +
			"and all that was issued through it until now.\n\n" +
			"The exit status is 1 if a CRL or status list does not have all of it: its server is away,\n" +
			"or its key is gone. What was revoked stays so, and is put there when the server is back.",
		Example: "  hallmark svid revoke leaked.pem --reason keyCompromise\n  hallmark svid revoke --token leaked.jwt\n" +
			"  hallmark svid revoke --serial 5847273541\n" +
			"  hallmark svid revoke --spiffe-id /web\n  hallmark svid revoke --node join_token/4f1c -o json",
		Args: arguments(0, -1, "a file"),
	}
	cmd.Flags().StringVar(&serial, "serial", "", "serial `number`, decimal, or hexadecimal after 0x")
	cmd.Flags().StringVar(&authority, "authority", "", "with --serial of a certificate: `ID` of the authority, if another server issued it")
	cmd.Flags().StringVar(&token, "token", "", "the JWT-SVID or WIT-SVID in this `FILE`; - reads it from the standard input")
	cmd.Flags().StringVar(&jti, "jti", "", "the token with this claim `jti`, if it has a status")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "all of this identity: `SPIFFE-ID` or just /PATH")
	cmd.Flags().StringVar(&node, "node", "", "this `AGENT`'s SVID, and all that was issued through it")
	cmd.Flags().StringVar(&reason, "reason", "unspecified", "`reason` in a CRL: unspecified, keyCompromise, affiliationChanged, superseded,\ncessationOfOperation or privilegeWithdrawn")
	cmd.Flags().Var(&wait, "wait", "`time` to wait for CRLs, status lists and agents (default 10s)")
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		number, ok := reasons[reason]
		if !ok {
			return usageError(fmt.Errorf("--reason %q is none; it is one of unspecified, keyCompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn", reason))
		}
		seconds, err := wait.seconds("--wait")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout+time.Duration(seconds)*time.Second+revokeMargin)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		var what []string
		req := &hallmarkv1.RevokeSVIDsRequest{Wait: seconds}
		add := func(text string, r *hallmarkv1.Revocation) {
			r.Reason = number
			what, req.Revocations = append(what, text), append(req.Revocations, r)
		}
		for _, file := range args {
			cert, err := certificateOf(file)
			if err != nil {
				return err
			}
			if len(cert.AuthorityKeyId) == 0 {
				return fmt.Errorf("%s: the certificate does not say which authority signed it", file)
			}
			add(fmt.Sprintf("the certificate in %s, serial number %v", file, cert.SerialNumber),
				&hallmarkv1.Revocation{SerialNumber: cert.SerialNumber.Bytes(), AuthorityId: hex.EncodeToString(cert.AuthorityKeyId)})
		}
		if token != "" {
			number, err := a.tokenSerial(ctx, c, token)
			if err != nil {
				return err
			}
			add(fmt.Sprintf("the token in %s, serial number %v", token, new(big.Int).SetBytes(number)), &hallmarkv1.Revocation{SerialNumber: number})
		}
		if jti != "" {
			number, err := base64.RawURLEncoding.DecodeString(jti)
			if err != nil || !statuslist.IsSerial(number) {
				return usageError(fmt.Errorf("--jti %.60q is none of a token with a status; \"hallmark svid list\" shows the serial numbers of all that can be revoked", jti))
			}
			add(fmt.Sprintf("the token with jti %s, serial number %v", jti, new(big.Int).SetBytes(number)), &hallmarkv1.Revocation{SerialNumber: number})
		}
		if serial != "" {
			n, ok := new(big.Int).SetString(serial, 0)
			if !ok || n.Sign() <= 0 || n.BitLen() > 160 {
				return usageError(fmt.Errorf("--serial %q is no serial number; write it in decimal, or in hexadecimal after 0x", serial))
			}
			add("serial number "+n.String(), &hallmarkv1.Revocation{SerialNumber: n.Bytes(), AuthorityId: strings.ToLower(authority)})
		} else if authority != "" {
			return usageError(errors.New("--authority goes with --serial"))
		}
		if id != "" {
			of, err := c.id(ctx, "--spiffe-id", id)
			if err != nil {
				return err
			}
			add("all SVIDs of "+idText(of)+" until now", &hallmarkv1.Revocation{SpiffeId: idText(of)})
		}
		if node != "" {
			of, err := c.node(ctx, node)
			if err != nil {
				return err
			}
			add("the SVID of "+idText(of)+" and all issued through it until now; the agent has to attest again", &hallmarkv1.Revocation{NodeId: idText(of)})
		}
		if len(what) == 0 {
			return usageError(errors.New("nothing to revoke was named: give a certificate's file, --token, --jti, --serial, --spiffe-id or --node"))
		}
		if err := a.confirm(*yes, false, "This will revoke:\n"+indent(strings.Join(what, "\n"), "  ")+"\nIt cannot be undone."); err != nil {
			return err
		}
		return a.revoke(ctx, c, req)
	}
	return cmd
}

// tokenSerial returns the serial number of the token in a file, which must be
// one that this trust domain has signed: its status is where it says.
func (a *app) tokenSerial(ctx context.Context, c *admin, file string) ([]byte, error) {
	source := a.in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		source = f
	}
	text, err := io.ReadAll(io.LimitReader(source, maxToken))
	if err != nil {
		return nil, err
	}
	t, err := jwt.Parse(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	b, err := c.bundles().GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, rpcError("get the bundle", err)
	}
	keys := make(map[string][]byte)
	for _, k := range b.JwtAuthorities {
		keys[k.KeyId] = k.PublicKey
	}
	for _, k := range b.WitAuthorities {
		keys[k.KeyId] = k.PublicKey
	}
	kid, _ := t.HeaderText("kid")
	key, err := x509.ParsePKIXPublicKey(keys[kid])
	if err == nil {
		err = t.Verify(key)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: no JWT or WIT authority of this trust domain has signed this token", file)
	}
	ref, ok, err := statuslist.ReferenceOf(t.Claims)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	serial, is := ref.Serial()
	if !ok || !is {
		return nil, &failure{code: exitFailed, err: fmt.Errorf("%s: the token has no status list: it is good until it ends", file),
			remedy: "Set status_list_endpoint on the server, and later ones have. To end this one now, taint and\nrevoke the authority that signed it: hallmark authority taint jwt ID, hallmark authority revoke jwt ID."}
	}
	return serial[:], nil
}

// certificateOf reads the first certificate of a PEM file.
func certificateOf(file string) (*x509.Certificate, error) {
	const most = 1 << 20
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return nil, err
	}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, fmt.Errorf("%s has no certificate in PEM (-----BEGIN CERTIFICATE-----)", file)
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return cert, nil
	}
}

// revokedItem is what came of a revocation, as commands print it.
type revokedItem struct {
	Revision            int64          `json:"revision"`
	Covered             bool           `json:"covered"` // by all CRLs and status lists that it concerns
	Authorities         []coverageItem `json:"authorities"`
	StatusLists         []statusItem   `json:"status_lists"`
	Agents              int32          `json:"agents"`         // of this server that have them
	AgentsMissing       bool           `json:"agents_missing"` // others did not acknowledge in time
	ElapsedMicroseconds int64          `json:"elapsed_microseconds"`
}

// coverageItem is how far the CRL of an authority is.
type coverageItem struct {
	AuthorityID string `json:"authority_id"`
	Server      string `json:"server"`
	Covered     bool   `json:"covered"`
	CRLNumber   uint64 `json:"crl_number,omitempty"`
	Revoked     int32  `json:"revoked"` // certificates in its CRL
}

// statusItem is how far the status lists of a server are.
type statusItem struct {
	Server  string `json:"server"`
	Lists   int32  `json:"lists"`   // whose tokens have not all ended
	Revoked int32  `json:"revoked"` // tokens in them
	Covered bool   `json:"covered"`
}

func statusOf(all []*hallmarkv1.StatusCoverage) []statusItem {
	items := make([]statusItem, len(all))
	for i, c := range all {
		items[i] = statusItem{c.Server, c.Lists, c.Revoked, c.Covered}
	}
	return items
}

func coverageOf(all []*hallmarkv1.RevocationCoverage) []coverageItem {
	items := make([]coverageItem, len(all))
	for i, c := range all {
		items[i] = coverageItem{c.AuthorityId, c.Server, c.Covered, c.CrlNumber, c.Revoked}
	}
	return items
}

func (a *app) coverageTable(items []coverageItem, lists []statusItem) string {
	state := func(covered bool) cell {
		if covered {
			return painted(a.style.green, "has all of it")
		}
		return painted(a.style.red, "lacks some of it")
	}
	var tables []string
	if len(items) > 0 {
		t := table{style: a.style, header: []string{"AUTHORITY", "SERVER", "REVOKED", "CRL"}}
		for _, x := range items {
			t.add(text(x.AuthorityID), text(x.Server), text(fmt.Sprint(x.Revoked)), state(x.Covered))
		}
		tables = append(tables, t.String())
	}
	if len(lists) > 0 {
		t := table{style: a.style, header: []string{"STATUS LISTS", "SERVER", "REVOKED", "STATE"}}
		for _, x := range lists {
			t.add(text(fmt.Sprint(x.Lists)), text(x.Server), text(fmt.Sprint(x.Revoked)), state(x.Covered))
		}
		tables = append(tables, t.String())
	}
	return strings.Join(tables, "\n")
}

// revoke makes the call and prints what came of it.
func (a *app) revoke(ctx context.Context, c *admin, req *hallmarkv1.RevokeSVIDsRequest) error {
	resp, err := c.server().RevokeSVIDs(ctx, req)
	if err != nil {
		return rpcError("revoke", err)
	}
	item := revokedItem{
		Revision: resp.Revision, Covered: true, Authorities: coverageOf(resp.Authorities), StatusLists: statusOf(resp.StatusLists),
		Agents: resp.Agents, AgentsMissing: resp.AgentsMissing, ElapsedMicroseconds: resp.ElapsedMicroseconds,
	}
	for _, x := range item.Authorities {
		item.Covered = item.Covered && x.Covered
	}
	for _, x := range item.StatusLists {
		item.Covered = item.Covered && x.Covered
	}
	err = a.print(item, func(w io.Writer) {
		fmt.Fprintf(w, "revoked; %s of this server %s it after %v\n", count(int(item.Agents), "agent", "agents"),
			map[bool]string{true: "has", false: "have"}[item.Agents == 1], (time.Duration(item.ElapsedMicroseconds) * time.Microsecond).Round(time.Millisecond))
		io.WriteString(w, a.coverageTable(item.Authorities, item.StatusLists))
	})
	if err != nil {
		return err
	}
	if !item.Covered {
		return &failure{code: exitFailed, err: errors.New("not all CRLs and status lists have it yet"),
			remedy: "Start the servers that are away. If one is gone for good, or its key is, taint and\nrevoke its authority: hallmark authority taint x509 ID, hallmark authority revoke x509 ID."}
	}
	if item.AgentsMissing {
		return &failure{code: exitFailed, err: errors.New("not all agents have acknowledged it"), remedy: "\"hallmark node list\" shows how far each is; they get them once they are connected."}
	}
	return nil
}

// revocationItem is a revocation, as commands print it.
type revocationItem struct {
	Kind         string     `json:"kind"` // certificate, token, identity or node
	SerialNumber string     `json:"serial_number,omitempty"`
	AuthorityID  string     `json:"authority_id,omitempty"`
	SPIFFEID     string     `json:"spiffe_id,omitempty"` // of the identity or the node
	Reason       string     `json:"reason"`
	RevokedAt    *time.Time `json:"revoked_at"`
	EndsAt       *time.Time `json:"ends_at"` // when all that it is about has ended, and it is forgotten
}

func (a *app) svidRevocations() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revocations",
		Short: "list what is revoked, and the CRLs and status lists that have it",
		Long: "Revocations prints what was revoked and has not ended, on any server, the newest first, for\n" +
			"each X.509 authority whether its CRL has all that concerns it, and for each server whose\n" +
			"tokens have a status whether its status lists do.",
		Example: "  hallmark svid revocations\n  hallmark svid revocations -o json | jq '.authorities[] | select(.covered | not)'",
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
		resp, err := c.server().ListRevocations(ctx, &hallmarkv1.ListRevocationsRequest{})
		if err != nil {
			return rpcError("list revocations", err)
		}
		var out struct {
			Revocations []revocationItem `json:"revocations"`
			Authorities []coverageItem   `json:"authorities"`
			StatusLists []statusItem     `json:"status_lists"`
		}
		out.Revocations = make([]revocationItem, 0, len(resp.Revocations))
		for _, r := range resp.Revocations {
			x := revocationItem{Kind: "identity", SPIFFEID: r.SpiffeId, Reason: reasonName(r.Reason), RevokedAt: timestamp(r.RevokedAt), EndsAt: timestamp(r.EndsAt)}
			switch {
			case statuslist.IsSerial(r.SerialNumber):
				x.Kind, x.SerialNumber = "token", new(big.Int).SetBytes(r.SerialNumber).String()
			case len(r.SerialNumber) > 0:
				x.Kind, x.SerialNumber, x.AuthorityID = "certificate", new(big.Int).SetBytes(r.SerialNumber).String(), r.AuthorityId
			case r.NodeId != "":
				x.Kind, x.SPIFFEID = "node", r.NodeId
			}
			out.Revocations = append(out.Revocations, x)
		}
		out.Authorities, out.StatusLists = coverageOf(resp.Authorities), statusOf(resp.StatusLists)
		return a.print(out, func(w io.Writer) {
			if len(out.Revocations) == 0 {
				a.remark("Nothing is revoked.")
				return
			}
			t := table{style: a.style, header: []string{"WHAT", "OF", "REASON", "REVOKED", "UNTIL"}}
			for _, x := range out.Revocations {
				t.add(text(x.Kind), painted(a.style.bold, x.SPIFFEID+x.SerialNumber), text(x.Reason), text(x.RevokedAt.UTC().Format(time.RFC3339)), text(a.relative(*x.EndsAt)))
			}
			io.WriteString(w, t.String()+"\n"+a.coverageTable(out.Authorities, out.StatusLists))
		})
	}
	return cmd
}
