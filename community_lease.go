package openaisecrets

// This file owns the revocation of the community plugin's leases; community.go has its
// config and roles.

import (
	"context"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// isCommunityLease reports whether the community plugin issued a lease. Its data has
// the three IDs that its own revocation requires.
func isCommunityLease(secret *logical.Secret) bool {
	if _, ours := secret.InternalData["version"]; ours {
		return false
	}
	for _, field := range []string{"project_id", "service_account_id", "api_key_id"} {
		if id, _ := secret.InternalData[field].(string); id == "" {
			return false
		}
	}
	return true
}

// communityLease converts a lease of the community plugin. Its role is in the path of
// the request.
func communityLease(req *logical.Request) leaseData {
	id := func(field string) string { return req.Secret.InternalData[field].(string) }
	return leaseData{
		credential: credential{
			Version: credentialVersion, Type: typeAccount,
			ProjectID: id("project_id"), ID: id("service_account_id"), KeyID: id("api_key_id"),
			CreatedAt: req.Secret.IssueTime,
		},
		Role: strings.TrimPrefix(req.Path, "creds/"), KeyExpiry: expiryNone,
	}
}

// unlessCommunity rejects the renewal of a lease of the community plugin. Vault does
// not request it, since that plugin issues leases as not renewable.
func unlessCommunity(renew framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		if req.Secret != nil && isCommunityLease(req.Secret) {
			return logical.ErrorResponse("leases issued by the community plugin cannot be renewed; run \"vault read %s%s\" for a new credential", req.MountPoint, req.Path), nil
		}
		return renew(ctx, req, d)
	}
}
