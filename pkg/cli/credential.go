package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/credential"
)

// The audiences that clouds propose.
const (
	awsAudience   = "sts.amazonaws.com"
	azureAudience = "api://AzureADTokenExchange"
)

func (a *app) credentialCommand() *cobra.Command {
	return noun("credential", "be the helper that clients of clouds, Kubernetes and Vault call",
		"Credential fetches a JWT-SVID (for IAM Roles Anywhere of AWS, the X509-SVID) over the\n"+
			"Workload API and makes of it what the clients of others ask a helper for.\n"+
			"They trust the trust domain by its OIDC issuer (oidc_issuer in the server's\n"+
			"configuration); no secret is kept anywhere.",
		"  hallmark credential aws --role-arn arn:aws:iam::123456789012:role/web\n  hallmark credential kubernetes --audience https://kubernetes.example.org\n"+
			"  hallmark credential azure --token-file /run/identity/azure.jwt --watch",
		a.credentialAWS(), a.credentialGCP(), a.credentialAzure(), a.credentialKubernetes(), a.credentialVault())
}

// subject is whose token a helper fetches, and for whom.
type subject struct {
	socket       *string
	id, audience string
}

func (s *subject) register(cmd *cobra.Command, audience string) {
	cmd.Flags().StringVar(&s.audience, "audience", "", "`name` of whom the token is for"+audience)
	cmd.Flags().StringVar(&s.id, "spiffe-id", "", "the `SPIFFE-ID` to use of several (default: the first)")
	s.socket = socketFlag(cmd, workloadSocket)
}

func (s *subject) params() (jwtsvid.Params, error) {
	params := jwtsvid.Params{Audience: s.audience}
	if s.id != "" {
		id, err := spiffeid.FromString(s.id)
		if err != nil {
			return params, usageError(fmt.Errorf("--spiffe-id %q: %w", s.id, err))
		}
		params.Subject = id
	}
	return params, nil
}

// fetch fetches one token.
func (s *subject) fetch(ctx context.Context) (*jwtsvid.SVID, credential.Token, error) {
	none := credential.Token{}
	params, err := s.params()
	if err != nil {
		return nil, none, err
	}
	client, err := workload(ctx, *s.socket)
	if err != nil {
		return nil, none, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	svid, err := client.FetchJWTSVID(ctx, params)
	if err != nil {
		return nil, none, workloadError("fetch a JWT-SVID", err)
	}
	return svid, credential.Token{Text: svid.Marshal(), ExpiresAt: svid.Expiry}, nil
}

// fetchX509 fetches the X509-SVID, of several that which is named or the first.
func (s *subject) fetchX509(ctx context.Context) (*x509svid.SVID, error) {
	params, err := s.params()
	if err != nil {
		return nil, err
	}
	client, err := workload(ctx, *s.socket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	svids, err := client.FetchX509SVIDs(ctx)
	if err != nil {
		return nil, workloadError("fetch an X509-SVID", err)
	}
	for _, svid := range svids {
		if params.Subject.IsZero() || svid.ID == params.Subject {
			return svid, nil
		}
	}
	return nil, fmt.Errorf("this process has no X509-SVID of %s; \"hallmark fetch x509\" lists those it has", params.Subject)
}

// writeToken writes a token to a file that only this user can read, atomically:
// once, or again whenever half of its lifetime is over. It removes the file when
// this process may have no token any more.
func (a *app) writeToken(ctx context.Context, s *subject, path string, watch bool) error {
	params, err := s.params()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write the token: %w", err)
	}
	client, err := workload(ctx, *s.socket)
	if err != nil {
		return err
	}
	defer client.Close()
	return a.followJWT(ctx, client, params, watch,
		func(svids []*jwtsvid.SVID, first bool) error {
			if err := writeFile(path, []byte(svids[0].Marshal()), 0o600); err != nil {
				return err
			}
			if first {
				a.remark("%s is the token of %s, until %s.", path, svids[0].ID, a.moment(svids[0].Expiry))
			}
			return nil
		},
		func(err error) {
			if status.Code(err) != codes.PermissionDenied {
				return
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				a.remark("%v", err)
			}
		})
}

func (a *app) credentialAWS() *cobra.Command {
	var s subject
	var role, session, region, endpoint, file, ca string
	var anywhere credential.RolesAnywhere
	var lasts duration
	var watch bool
	cmd := &cobra.Command{
		Use:   "aws",
		Short: "credentials of an AWS role, for credential_process or as a token file",
		Long: "AWS assumes a role with a JWT-SVID (AssumeRoleWithWebIdentity) and prints what AWS SDKs\n" +
			"read of a credential_process. With --token-file it writes the JWT-SVID instead, for SDKs\n" +
			"that find it by AWS_WEB_IDENTITY_TOKEN_FILE and assume the role themselves.\n\n" +
			"With --trust-anchor-arn and --profile-arn it assumes the role with the X509-SVID, by IAM\n" +
			"Roles Anywhere, whose trust anchor is the X.509 authority. That needs no OIDC issuer. It\n" +
			"asks the region of the trust anchor, or $AWS_ENDPOINT_URL_ROLESANYWHERE.\n\n" +
			"In ~/.aws/config:\n\n" +
			"  [profile web]\n  credential_process = hallmark credential aws --role-arn arn:aws:iam::123456789012:role/web",
		Example: "  hallmark credential aws --role-arn arn:aws:iam::123456789012:role/web --region eu-central-1\n" +
			"  hallmark credential aws --role-arn arn:aws:iam::123456789012:role/web" +
			" --trust-anchor-arn arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/ID" +
			" --profile-arn arn:aws:rolesanywhere:eu-central-1:123456789012:profile/ID\n" +
			"  hallmark credential aws --token-file /run/identity/aws.jwt --watch",
		Args: noArguments,
	}
	s.register(cmd, " (default "+awsAudience+")")
	cmd.Flags().StringVar(&role, "role-arn", "", "`ARN` of the role (default $AWS_ROLE_ARN)")
	cmd.Flags().StringVar(&session, "session-name", "", "the session's `name` in CloudTrail (default $AWS_ROLE_SESSION_NAME, then of the SPIFFE ID)")
	cmd.Flags().StringVar(&region, "region", "", "`region` whose STS is asked (default $AWS_REGION, $AWS_DEFAULT_REGION, then the global one)")
	cmd.Flags().StringVar(&endpoint, "sts-endpoint", "", "`URL` of STS (default $AWS_ENDPOINT_URL_STS, then that of the region)")
	cmd.Flags().StringVar(&anywhere.TrustAnchorARN, "trust-anchor-arn", "", "`ARN` of the trust anchor of IAM Roles Anywhere; its region is asked")
	cmd.Flags().StringVar(&anywhere.ProfileARN, "profile-arn", "", "`ARN` of the profile of IAM Roles Anywhere")
	cmd.Flags().Var(&lasts, "duration", "how `long` the credentials last, 15m to 12h (default: as the role or profile says)")
	cmd.Flags().StringVar(&ca, "ca-file", "", "PEM `file` of AWS's authorities (default: the system's)")
	cmd.Flags().StringVar(&file, "token-file", "", "`file` to write the token to instead of assuming a role")
	cmd.Flags().BoolVar(&watch, "watch", false, "with --token-file, go on, and write new tokens in time")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		if anywhere.TrustAnchorARN != "" || anywhere.ProfileARN != "" {
			for _, other := range []string{"audience", "token-file", "watch", "region", "sts-endpoint"} {
				if cmd.Flags().Changed(other) {
					return usageError(fmt.Errorf("--%s is of no use with a trust anchor, whose role is assumed with the X509-SVID in its own region", other))
				}
			}
			if err := required(cmd, "trust-anchor-arn", "profile-arn"); err != nil {
				return err
			}
			anywhere.RoleARN, anywhere.SessionName = cmp.Or(role, os.Getenv("AWS_ROLE_ARN")), session
			anywhere.Duration = time.Duration(lasts.Duration)
			return a.assumeAnywhere(ctx, &s, anywhere, ca)
		}
		s.audience = cmp.Or(s.audience, awsAudience)
		if file != "" {
			return a.writeToken(ctx, &s, file, watch)
		}
		if watch {
			return usageError(errors.New("--watch goes with --token-file; AWS SDKs run a credential_process again by themselves"))
		}
		of := credential.AWS{
			RoleARN: cmp.Or(role, os.Getenv("AWS_ROLE_ARN")), SessionName: cmp.Or(session, os.Getenv("AWS_ROLE_SESSION_NAME")),
			Endpoint: cmp.Or(endpoint, os.Getenv("AWS_ENDPOINT_URL_STS")), Duration: time.Duration(lasts.Duration),
		}
		if of.RoleARN == "" {
			return usageError(errors.New("no role is named; give --role-arn, or set AWS_ROLE_ARN"))
		}
		var err error
		if of.Endpoint == "" {
			if of.Endpoint, err = credential.STSEndpoint(cmp.Or(region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"))); err != nil {
				return usageError(err)
			}
		}
		if err := of.Check(); err != nil {
			return usageError(err)
		}
		if of.Client, err = credential.Client(ca); err != nil {
			return err
		}
		svid, token, err := s.fetch(ctx)
		if err != nil {
			return err
		}
		of.SessionName = cmp.Or(of.SessionName, credential.SessionName(svid.ID.Path()))
		given, err := of.Assume(ctx, token.Text)
		if err != nil {
			return err
		}
		return json.NewEncoder(a.out).Encode(given)
	}
	return cmd
}

// assumeAnywhere prints credentials of the role that an X509-SVID assumes.
func (a *app) assumeAnywhere(ctx context.Context, s *subject, of credential.RolesAnywhere, ca string) (err error) {
	if of.RoleARN == "" {
		return usageError(errors.New("no role is named; give --role-arn, or set AWS_ROLE_ARN"))
	}
	if of.Endpoint = os.Getenv("AWS_ENDPOINT_URL_ROLESANYWHERE"); of.Endpoint == "" {
		if of.Endpoint, err = credential.RolesAnywhereEndpoint(of.TrustAnchorARN); err != nil {
			return usageError(err)
		}
	}
	if err := of.Check(); err != nil {
		return usageError(err)
	}
	if of.Client, err = credential.Client(ca); err != nil {
		return err
	}
	svid, err := s.fetchX509(ctx)
	if err != nil {
		return err
	}
	given, err := of.Assume(ctx, svid.Certificates, svid.PrivateKey, a.now())
	if err != nil {
		return err
	}
	return json.NewEncoder(a.out).Encode(given)
}

func (a *app) credentialGCP() *cobra.Command {
	var s subject
	cmd := &cobra.Command{
		Use:   "gcp",
		Short: "the executable of an external account of Google Cloud",
		Long: "GCP prints a JWT-SVID as Google's libraries read it of the executable of an external\n" +
			"account. They name the audience in their environment (GOOGLE_EXTERNAL_ACCOUNT_AUDIENCE)\n" +
			"and, if so configured, a file that keeps the answer until it ends. They run it if\n" +
			"GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES is 1.\n\n" +
			"In the credential configuration:\n\n" +
			"  \"credential_source\": {\"executable\": {\"command\": \"/usr/bin/hallmark credential gcp\"}}",
		Example: "  hallmark credential gcp --audience https://iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/hallmark",
		Args:    noArguments,
	}
	s.register(cmd, " (default: the provider asked for)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		answer, err := a.googleAnswer(cmd.Context(), &s)
		if err != nil {
			// The library reads that there is no token, and why.
			if said, failed := credential.GoogleFailure(fmt.Sprint(exitFailed), err.Error()); failed == nil {
				_, _ = a.out.Write(said)
			}
			return err
		}
		_, err = a.out.Write(answer)
		return err
	}
	return cmd
}

// googleAnswer answers what Google's libraries ask for in the environment.
func (a *app) googleAnswer(ctx context.Context, s *subject) ([]byte, error) {
	asked, err := credential.ReadGoogleRequest(os.Getenv)
	if err != nil {
		return nil, err
	}
	if s.audience == "" {
		if s.audience, err = asked.TokenAudience(); err != nil {
			return nil, usageError(fmt.Errorf("%w with --audience", err))
		}
	}
	_, token, err := s.fetch(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := credential.GoogleAnswer(token, asked)
	if err == nil && asked.OutputFile != "" {
		err = writeFile(asked.OutputFile, answer, 0o600)
	}
	return answer, err
}

func (a *app) credentialAzure() *cobra.Command {
	var s subject
	var file string
	var watch bool
	cmd := &cobra.Command{
		Use:   "azure",
		Short: "the federated token file of Azure's libraries",
		Long: "Azure writes a JWT-SVID to the file that Azure's libraries read as the federated token of\n" +
			"a workload identity (AZURE_FEDERATED_TOKEN_FILE, beside AZURE_CLIENT_ID and\n" +
			"AZURE_TENANT_ID). With --watch it writes a new one in time.",
		Example: "  hallmark credential azure --token-file /run/identity/azure.jwt --watch",
		Args:    noArguments,
	}
	s.register(cmd, " (default "+azureAudience+")")
	cmd.Flags().StringVar(&file, "token-file", "", "`file` to write the token to (default $AZURE_FEDERATED_TOKEN_FILE)")
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, and write new tokens in time")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		path := cmp.Or(file, os.Getenv("AZURE_FEDERATED_TOKEN_FILE"))
		if path == "" {
			return usageError(errors.New("no file is named; give --token-file, or set AZURE_FEDERATED_TOKEN_FILE"))
		}
		s.audience = cmp.Or(s.audience, azureAudience)
		return a.writeToken(cmd.Context(), &s, path, watch)
	}
	return cmd
}

func (a *app) credentialKubernetes() *cobra.Command {
	var s subject
	cmd := &cobra.Command{
		Use:   "kubernetes",
		Short: "the plugin that kubectl and client-go run",
		Long: "Kubernetes prints a JWT-SVID as an ExecCredential, which kubectl and other clients of\n" +
			"Kubernetes read of the plugin that a kubeconfig names. The API server takes it with\n" +
			"--oidc-issuer-url, or an AuthenticationConfiguration, whose audience is this one.\n\n" +
			"In the kubeconfig:\n\n" +
			"  users:\n  - name: web\n    user:\n      exec:\n        apiVersion: client.authentication.k8s.io/v1\n        interactiveMode: Never\n" +
			"        command: hallmark\n        args: [credential, kubernetes, --audience, https://kubernetes.example.org]",
		Example: "  hallmark credential kubernetes --audience https://kubernetes.example.org",
		Args:    noArguments,
	}
	s.register(cmd, ", as the API server has it")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "audience"); err != nil {
			return err
		}
		version, err := credential.ExecVersion(os.Getenv("KUBERNETES_EXEC_INFO"))
		if err != nil {
			return err
		}
		_, token, err := s.fetch(cmd.Context())
		if err != nil {
			return err
		}
		answer, err := credential.ExecCredential(version, token)
		if err != nil {
			return err
		}
		_, err = a.out.Write(answer)
		return err
	}
	return cmd
}

// vaultItem is a token of Vault as it is printed.
type vaultItem struct {
	*credential.VaultToken
	ExpiresAt *time.Time `json:"expires_at"` // null: it does not end
}

func (a *app) credentialVault() *cobra.Command {
	var s subject
	of := credential.Vault{}
	var ca string
	cmd := &cobra.Command{
		Use:   "vault",
		Short: "a token of HashiCorp Vault or OpenBao",
		Long: "Vault logs in with a JWT-SVID (auth method jwt, whose oidc_discovery_url is the issuer)\n" +
			"and prints the token, for $VAULT_TOKEN.",
		Example: "  export VAULT_TOKEN=$(hallmark credential vault --role web --audience https://vault.example.org)",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&of.Role, "role", "", "`role` of the auth method")
	s.register(cmd, ", of the role's bound_audiences")
	cmd.Flags().StringVar(&of.Address, "address", "", "`URL` of Vault (default $VAULT_ADDR)")
	cmd.Flags().StringVar(&of.Mount, "mount", "jwt", "`path` of the auth method")
	cmd.Flags().StringVar(&of.Namespace, "namespace", "", "`namespace` (default $VAULT_NAMESPACE)")
	cmd.Flags().StringVar(&ca, "ca-file", "", "PEM `file` of Vault's authorities (default $VAULT_CACERT, then the system's)")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "role", "audience"); err != nil {
			return err
		}
		of.Address, of.Namespace = cmp.Or(of.Address, os.Getenv("VAULT_ADDR")), cmp.Or(of.Namespace, os.Getenv("VAULT_NAMESPACE"))
		if of.Address == "" {
			return usageError(errors.New("no Vault is named; give --address, or set VAULT_ADDR"))
		}
		var err error
		if of.Client, err = credential.Client(cmp.Or(ca, os.Getenv("VAULT_CACERT"))); err != nil {
			return err
		}
		_, token, err := s.fetch(cmd.Context())
		if err != nil {
			return err
		}
		given, err := of.Login(cmd.Context(), token.Text)
		if err != nil {
			return err
		}
		item := vaultItem{VaultToken: given}
		if given.Lease > 0 {
			item.ExpiresAt = timestamp(a.now().Add(given.Lease).Unix())
		}
		return a.print(item, func(w io.Writer) { fmt.Fprintln(w, given.Token) })
	}
	return cmd
}
